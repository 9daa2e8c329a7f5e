"""The importance of inputs in conversions to GGUF: what imatrix.gguf holds, against plain loops and against llama.cpp's
own graph; what an imatrix in place of text does; the key part of kv_b_proj, whose heads read different things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.calibrate.dataset import token_rows
from quantkit.errors import OutputError, SourceError
from quantkit.plan.recipe import Recipe
from tests.convert.gguf_jobs import (
    GPTQ,
    RTN,
    decoded_gguf,
    gguf_output,
    gguf_recipe,
    model_files,
    read_imatrix,
    stored_bytes,
    stored_types,
    wide_config,
)
from tests.convert.jobs import run, write_model, write_text
from tests.oracles import llama_imatrix
from tests.oracles.inputs import Sums, attention_inputs, input_sums
from tests.tiny_models import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint "model", and a text."""
    folder = tmp_path_factory.mktemp("job")
    write_text(folder / "calibration.txt")
    write_model(folder / "model", wide_config(), fp8=True)
    return folder


@pytest.fixture(scope="module")
def original(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the source holds, decoded to float32."""
    weights = write_checkpoint(tmp_path_factory.mktemp("same"), wide_config(), fp8=True)
    return {name: tensor.float() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def plain(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in float32."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(place / "model", gguf_recipe(gguf_output(preset="F32")), out)
    return out


TOKENS = 256


def rows_of(place: Path, recipe: Recipe) -> np.ndarray:
    """The calibration tokens (rows, length)."""
    assert recipe.calibration is not None
    return token_rows(recipe.calibration, place / "model", place).tokens


def embedded(place: Path, recipe: Recipe, original: dict[str, Tensor]) -> Tensor:
    return original["model.embed_tokens.weight"][torch.from_numpy(rows_of(place, recipe)).long()]


def assert_imatrix(folder: Path, expected: Sums, tolerance: float) -> None:
    found = read_imatrix(folder)
    assert set(found) >= set(expected)
    for name, (sums, counts) in expected.items():
        assert found[name][1].tolist() == counts, name
        written = torch.from_numpy(found[name][0].copy()).double().view(sums.shape)
        # By matrix, so that an expert with few tokens weighs as much as one with many.
        distance = (written - sums).norm(dim=1) / sums.norm(dim=1).clamp_min(1e-30)
        assert float(distance.max()) < tolerance, (name, distance)


WEIGHTED = gguf_output(preset="Q4_K_M", method=RTN)


@pytest.fixture(scope="module")
def weighted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round to nearest under the importance of text that the original weights carry."""
    out = tmp_path_factory.mktemp("weighted") / "out"
    run(place / "model", gguf_recipe(WEIGHTED, tokens=TOKENS, propagate="original"), out)
    return out


def test_the_imatrix_holds_the_sums_of_squares(weighted: Path, place: Path, original: dict[str, Tensor]) -> None:
    recipe = gguf_recipe(WEIGHTED, tokens=TOKENS)
    expected = input_sums(wide_config(), original.__getitem__, embedded(place, recipe, original))
    assert_imatrix(weighted, expected, 1e-5)
    assert set(read_imatrix(weighted)) == set(expected)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(weighted / "imatrix.gguf").fields.items()}
    assert (fields["general.type"], fields["imatrix.datasets"]) == ("imatrix", ["calibration.txt"])
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (8, 32)


def test_llama_cpp_s_own_graph_reads_the_same(weighted: Path, plain: Path, place: Path) -> None:
    """The same tokens through llama.cpp in float32: what llama-imatrix would have recorded."""
    pytest.importorskip("xllamacpp")
    records = llama_imatrix.collect(model_files(plain)[0], rows_of(place, gguf_recipe(WEIGHTED, tokens=TOKENS)))
    expected = {
        name: (torch.from_numpy(record.in_sum2), record.counts.tolist())
        for name, record in records.items()
        if "ffn_gate_inp" not in name
    }
    # It multiplies attn_v_b onto latents that attention has mixed, we onto the latents before: their squares differ.
    assert {name for name in expected if "attn_v_b" in name} == {f"blk.{layer}.attn_v_b.weight" for layer in range(2)}
    assert_imatrix(weighted, {name: sums for name, sums in expected.items() if "attn_v_b" not in name}, 1e-3)


def test_the_stream_is_carried_by_the_weights_in_the_file(
    place: Path, original: dict[str, Tensor], tmp_path: Path
) -> None:
    """What the second layer reads, and o_proj of the first, depends on every decoded matrix before it, the two parts of
    kv_b_proj included."""
    recipe = gguf_recipe(gguf_output(preset="Q4_0", method=RTN), tokens=TOKENS)
    run(place / "model", recipe, tmp_path / "out")
    carried = decoded_gguf(tmp_path / "out")
    expected = input_sums(wide_config(), carried.__getitem__, embedded(place, recipe, original))
    assert_imatrix(tmp_path / "out", expected, 1e-5)
    # It must be able to fail: without the values of kv_b_proj, or with its original keys, the sums are others.
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    for part in arch_of(wide_config()).parts().values():
        if part.whole != name:
            continue
        mixed = carried[name].clone()
        part.put(mixed, part.take(original[name]))
        other = input_sums(wide_config(), {**carried, name: mixed}.__getitem__, embedded(place, recipe, original))
        with pytest.raises(AssertionError):
            assert_imatrix(tmp_path / "out", other, 1e-4)


def test_borrowed_tokens_count(place: Path, tmp_path: Path) -> None:
    """Importance is that of the tokens behind the statistics, and so are the counts."""
    run(place / "model", gguf_recipe(WEIGHTED, tokens=TOKENS, least=TOKENS), tmp_path / "out")
    counts = {name: counts for name, (_, counts) in read_imatrix(tmp_path / "out").items() if "_exps" in name}
    assert len(counts) == 3
    assert {n for row in counts.values() for n in row.tolist()} == {TOKENS}


def test_a_model_that_is_kept_whole_has_its_imatrix_too(
    place: Path, original: dict[str, Tensor], tmp_path: Path
) -> None:
    recipe = gguf_recipe(gguf_output(preset="BF16"), tokens=64)
    run(place / "model", recipe, tmp_path / "out")
    assert_imatrix(
        tmp_path / "out", input_sums(wide_config(), original.__getitem__, embedded(place, recipe, original)), 1e-5
    )


def test_no_imatrix_where_none_is_wanted(plain: Path, place: Path, tmp_path: Path) -> None:
    assert not (plain / "imatrix.gguf").exists()  # data-free
    run(place / "model", gguf_recipe(gguf_output(preset="F16", imatrix=False), tokens=64), tmp_path / "out")
    assert [path.name for path in tmp_path.glob("out/*.gguf")] == ["model-main.gguf"]


# ----------------------------------------------------------------------------------------- an imatrix instead of text


def from_imatrix(place: Path, imatrix: Path, out: Path, **changes: Any) -> None:
    (place / imatrix.name).write_bytes(imatrix.read_bytes())
    run(place / "model", gguf_recipe({**WEIGHTED, **changes}, imatrix=imatrix.name), out)


def test_an_imatrix_stands_for_the_text(weighted: Path, place: Path, tmp_path: Path) -> None:
    """The file keeps sums in float32, so that a mean may come back changed in its last digits: a few blocks may choose
    another scale among equals."""
    from_imatrix(place, weighted / "imatrix.gguf", tmp_path / "out")
    assert not (tmp_path / "out" / "imatrix.gguf").exists()
    assert stored_types(tmp_path / "out") == stored_types(weighted)
    again, first = stored_bytes(tmp_path / "out"), stored_bytes(weighted)
    different = sum(a != b for name in first for a, b in zip(again[name], first[name], strict=True))
    assert different < 1e-3 * sum(map(len, first.values()))
    # Without importance much more is different.
    run(place / "model", gguf_recipe(WEIGHTED), tmp_path / "blind")
    blind = stored_bytes(tmp_path / "blind")
    name = "blk.1.ffn_gate_exps.weight"
    assert np.mean(np.frombuffer(blind[name], np.uint8) != np.frombuffer(first[name], np.uint8)) > 0.1


def write_imatrix(path: Path, records: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    made = {name: llama_imatrix.Record(sums, counts) for name, (sums, counts) in records.items()}
    llama_imatrix.write(path, made, chunk_size=32, chunks=8, datasets=["calibration.txt"])
    return path


def test_weights_that_the_imatrix_lacks_count_as_without(weighted: Path, place: Path, tmp_path: Path) -> None:
    records = read_imatrix(weighted)
    absent = {"blk.0.attn_k_b.weight", "blk.0.attn_output.weight", "blk.1.ffn_up_exps.weight"}
    path = write_imatrix(tmp_path / "some.gguf", {n: r for n, r in records.items() if n not in absent})
    from_imatrix(place, path, tmp_path / "some")
    from_imatrix(place, weighted / "imatrix.gguf", tmp_path / "all")
    run(place / "model", gguf_recipe(WEIGHTED), tmp_path / "none")
    some, all_, none = (stored_bytes(tmp_path / name) for name in ("some", "all", "none"))
    types = stored_types(tmp_path / "none")
    for name in records:
        if types[name] == stored_types(tmp_path / "some")[name]:
            assert some[name] == (none if name in absent else all_)[name], name
    assert all(all_[name] != none[name] for name in absent)
    tensors = json.loads((tmp_path / "some" / "quantkit.json").read_text())["tensors"]
    told = {name.removeprefix("model.layers.") for name, entry in tensors.items() if "fallback" in entry}
    ups = {f"1.mlp.experts.{expert}.up_proj.weight" for expert in range(4)}
    assert told == {"0.self_attn.kv_b_proj.weight:k", "0.self_attn.o_proj.weight", *ups}


def test_an_output_that_holds_the_imatrix_is_not_replaced(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(place / "model", gguf_recipe(WEIGHTED, tokens=TOKENS), out)
    with pytest.raises(OutputError, match=r"holds .*imatrix\.gguf, which would be replaced"):
        run(place / "model", gguf_recipe(WEIGHTED, imatrix=str(out / "imatrix.gguf")), out, restart=True)
    assert (out / "imatrix.gguf").exists()


def test_an_imatrix_that_is_not_this_model_s_is_one_line(weighted: Path, place: Path, tmp_path: Path) -> None:
    records = read_imatrix(weighted)
    name = "blk.1.ffn_down_exps.weight"
    sums, counts = records[name]
    three = {**records, name: (sums[:3], counts[:3])}
    infinite = {**records, name: (np.where(np.arange(4)[:, None] == 2, np.inf, sums), counts)}
    negative = {**records, name: (-sums, counts)}
    cases = (
        (three, f"{name}: has 768 values and 3 counts, this model needs 4 x 256 values."),
        ({"blk.7.attn_q_a.weight": records["blk.0.attn_q_a.weight"]}, "has none of the "),
        (infinite, f"{name}: has values that are not finite."),
        (negative, f"{name}: has negative values."),
    )
    for number, (bad, said) in enumerate(cases):
        path = write_imatrix(tmp_path / "bad.gguf", bad)
        with pytest.raises(SourceError) as caught:
            from_imatrix(place, path, tmp_path / str(number))
        assert said in str(caught.value)
        assert str(place / "bad.gguf") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / str(number)).exists()
    with pytest.raises(SourceError, match=r"x\.gguf"):
        run(place / "model", gguf_recipe(WEIGHTED, imatrix="x.gguf"), tmp_path / "out")


# ------------------------------------------------------------------------------------------ the key part of kv_b_proj


@pytest.fixture(scope="module")
def key_parts(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """attn_k_b alone in Q4_0, by method."""
    folder = tmp_path_factory.mktemp("keys")
    for name, method in (("gptq", {**GPTQ, "cross": 0}), ("rtn", RTN)):
        rule = {"match": "*.kv_b_proj.weight:k", "scheme": "Q4_0", "method": method}
        run(
            place / "model",
            gguf_recipe(gguf_output(rule, preset="F32"), tokens=2048, propagate="original"),
            folder / name,
        )
    return {name: folder / name for name in ("gptq", "rtn")}


def queries_of(place: Path, original: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """Of layer 0: queries without position (heads, tokens, nope) and latents (tokens, rank), float64."""
    x = embedded(place, gguf_recipe(WEIGHTED, tokens=2048), original)
    found = attention_inputs(wide_config(), original.__getitem__, layer, x)
    return found["attn_k_b"], found["attn_v_b"][0]


def key_part(weights: dict[str, Tensor]) -> Tensor:
    """(heads, rank, nope) of layer 0, float64."""
    c = wide_config()
    heads = weights["model.layers.0.self_attn.kv_b_proj.weight"].view(c["num_attention_heads"], -1, c["kv_lora_rank"])
    return heads[:, : c["qk_nope_head_dim"]].mT.double()


def test_the_loss_of_the_key_part_is_that_of_the_file(
    key_parts: dict[str, Path], place: Path, original: dict[str, Tensor]
) -> None:
    """What quantkit.json says is tr(E H E^T) / tr(W H W^T), the mean over heads, with the queries' damped moments."""
    queries, _ = queries_of(place, original, 0)
    hessian = queries.mT @ queries / queries.shape[1]
    damping = 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(-1)
    hessian += damping[:, None, None] * torch.eye(hessian.shape[-1], dtype=torch.float64)
    before = key_part(original)
    losses: dict[str, float] = {}
    for name, folder in key_parts.items():
        error = key_part(decoded_gguf(folder)) - before
        loss = ((error @ hessian) * error).sum((1, 2)) / ((before @ hessian) * before).sum((1, 2))
        losses[name] = float(loss.mean())
    document = json.loads((key_parts["gptq"] / "quantkit.json").read_text())
    record = document["tensors"]["model.layers.0.self_attn.kv_b_proj.weight:k"]
    assert record["relative_loss"] == pytest.approx(losses["gptq"], rel=1e-3)
    assert record["n_tokens"] == 2048
    assert losses["gptq"] < 0.8 * losses["rtn"]


def test_error_feedback_on_the_key_part_lowers_the_error_of_attention_scores(
    key_parts: dict[str, Path], place: Path, original: dict[str, Tensor]
) -> None:
    """Scores of all pairs of a query and an earlier latent of the same row, in float64."""
    queries, latents = queries_of(place, original, 0)
    rows = queries.view(4, -1, 32, queries.shape[-1])
    keys = latents.view(-1, 32, latents.shape[-1])
    causal = torch.ones(32, 32, dtype=torch.float64).tril()

    def score_error(folder: Path) -> Tensor:
        change = key_part(decoded_gguf(folder)) - key_part(original)
        through = torch.einsum("hrtn,hkn->hrtk", rows, change)
        return (torch.einsum("hrtk,rsk->hrts", through, keys) * causal).square().sum((1, 2, 3))

    errors = {name: score_error(folder) for name, folder in key_parts.items()}
    assert bool((errors["gptq"] < 0.9 * errors["rtn"]).all()), errors
