"""A conversion to GGUF as a whole, read back by gguf-py: every tensor, at its place, within its type's error; beside
another output; in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.convert import copying
from quantkit.errors import SchemeError
from quantkit.formats.gguf.sink import GgufSink
from quantkit.plan.batch_sizes import MOST_EXPERTS
from quantkit.plan.recipe import Recipe
from quantkit.plan.targets import target_of
from quantkit.schemes import QuantizedTensor
from tests.convert.gguf_jobs import (
    GPTQ,
    compressed,
    decoded_gguf,
    gguf_output,
    gguf_recipe,
    model_files,
    stored_bytes,
    stored_types,
    wide_config,
)
from tests.convert.jobs import INT4_GPTQ, run, shards_of, write_model, write_text
from tests.tiny_models import write_checkpoint, write_shards

ROOT = Path(__file__).parents[2]
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


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------ what comes out


@pytest.fixture(scope="module")
def plain(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in float32, the MTP layer too."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(place / "model", gguf_recipe(gguf_output(preset="F32", mtp="keep")), out)
    return out


def test_float32_is_exact(plain: Path, original: dict[str, Tensor]) -> None:
    found = decoded_gguf(plain)
    assert set(found) == set(original)
    assert set(stored_types(plain).values()) == {"F32"}
    for name, tensor in original.items():
        assert torch.equal(found[name], tensor), name


def test_metadata(plain: Path, place: Path) -> None:
    (path,) = model_files(plain)
    assert path.name == "model-main.gguf"
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert (fields["general.architecture"], fields["general.type"], fields["general.name"]) == (
        "deepseek2",
        "model",
        "model",
    )
    assert (fields["deepseek2.block_count"], fields["deepseek2.nextn_predict_layers"]) == (3, 1)
    assert (fields["general.file_type"], fields["general.quantization_version"]) == (gguf.LlamaFileType.ALL_F32, 2)
    assert len(fields["tokenizer.ggml.tokens"]) == wide_config()["vocab_size"]
    document = json.loads((plain / "quantkit.json").read_text())
    assert document["tensor_bytes"] == sum(map(len, stored_bytes(plain).values()))
    assert not (plain / "config.json").exists()


# Relative rms error of normally distributed weights; the least error is there so that nothing passes unquantised.
ERRORS = {
    "Q8_0": 0.0052, "Q6_K": 0.0175, "Q5_1": 0.035, "Q5_K": 0.0355, "Q5_0": 0.042, "Q4_1": 0.0725, "Q4_K": 0.0725,
    "IQ4_NL": 0.077, "IQ4_XS": 0.077, "Q4_0": 0.085, "MXFP4": 0.118, "IQ3_S": 0.136, "Q3_K": 0.15, "IQ3_XXS": 0.185,
    "Q2_K": 0.272, "IQ2_S": 0.25, "IQ2_XS": 0.3, "IQ2_XXS": 0.345, "IQ1_M": 0.435,
}  # fmt: skip
TYPES = {
    "self_attn.q_a_proj": "Q8_0",
    "self_attn.q_b_proj": "Q6_K",
    "self_attn.kv_a_proj_with_mqa": "Q5_K",
    "self_attn.kv_b_proj.weight:k": "Q4_0",
    "self_attn.kv_b_proj.weight:v": "Q5_1",
    "self_attn.o_proj": "Q4_K",
    "0.mlp.gate_proj": "Q4_1",
    "0.mlp.up_proj": "Q5_0",
    "0.mlp.down_proj": "IQ4_NL",
    "mlp.experts.*.gate_proj": "Q3_K",
    "mlp.experts.*.up_proj": "IQ3_S",
    "mlp.experts.*.down_proj": "IQ4_XS",
    "shared_experts.gate_proj": "Q2_K",
    "shared_experts.up_proj": "IQ3_XXS",
    "shared_experts.down_proj": "MXFP4",
    "embed_tokens": "IQ2_S",
    "lm_head": "IQ2_XS",
    "eh_proj": "IQ2_XXS",
    "shared_head.head": "IQ1_M",
}
"""Of all types but IQ1_S, and Q2_0, which gguf-py does not read. Part of an official name -> type."""
RULES = [{"match": f"*{part}" + ("" if ":" in part else ".weight"), "scheme": kind} for part, kind in TYPES.items()]


@pytest.fixture(scope="module")
def typed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of each type."""
    out = tmp_path_factory.mktemp("typed") / "out"
    run(place / "model", gguf_recipe(gguf_output(*RULES, {"match": "*", "keep": "bf16"}, mtp="keep")), out)
    return out


def test_every_tensor_is_at_its_place_within_the_error_of_its_type(
    typed: Path, plain: Path, original: dict[str, Tensor]
) -> None:
    types, exact = stored_types(typed), stored_types(plain)
    assert set(types) == set(exact)
    assert set(types.values()) == set(ERRORS) | {"F32"}
    arch = arch_of(wide_config())
    name_of = arch.gguf().stored_name
    parts = arch.parts()
    found = decoded_gguf(typed)
    assert set(found) == set(original)
    for name, before in original.items():
        own = [part for part in parts if parts[part].whole == name] or [name]
        for part in own:
            one, wanted = (parts[part].take(t) if part in parts else t for t in (found[name], before))
            kind = types[name_of(part)[0]]
            if kind == "F32":
                assert torch.equal(one, wanted), part
            else:
                assert 0.7 * ERRORS[kind] < relative(one, wanted) < ERRORS[kind], (part, kind, relative(one, wanted))


def test_our_own_reader_decodes_the_same(typed: Path, place: Path) -> None:
    recipe = gguf_recipe(gguf_output(preset="F32"))
    target = target_of(recipe.outputs[0], recipe, arch := arch_of(wide_config()), tuple(arch.tensors()))
    expected = decoded_gguf(typed)
    with target.open_written(typed) as source:
        for name, tensor in expected.items():
            assert torch.equal(source.read(name), tensor), name
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        assert torch.equal(source.read(name, (3, 9)), expected[name][3:9])
        rows = source.read_rows("model.embed_tokens.weight", [7, 0, 7])
        assert torch.equal(rows, expected["model.embed_tokens.weight"][[7, 0, 7]])


def test_splits_are_llama_cpp_s_and_hold_the_same_tensors(typed: Path, place: Path, tmp_path: Path) -> None:
    output = gguf_output(*RULES, {"match": "*", "keep": "bf16"}, mtp="keep", split_max_size="1MiB")
    run(place / "model", gguf_recipe(output), tmp_path / "out")
    files = model_files(tmp_path / "out")
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-main-{i + 1:05d}-of-{len(files):05d}.gguf" for i in range(len(files))
    ]
    assert stored_bytes(tmp_path / "out") == stored_bytes(typed)
    counts: list[int] = []
    for number, path in enumerate(files):
        reader = gguf.GGUFReader(path)
        assert reader.fields["split.no"].contents() == number
        assert reader.fields["split.count"].contents() == len(files)
        assert reader.fields["split.tensors.count"].contents() == len(stored_types(typed))
        assert ("general.architecture" in reader.fields) == (number == 0)
        counts.append(len(reader.tensors))
        assert sum(t.n_bytes for t in reader.tensors) <= 2**20 or len(reader.tensors) == 1
    assert sum(counts) == len(stored_types(typed))


def test_tables_in_pieces_are_the_same(
    typed: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabulary matrices pass in rows; here a hundred or so at a time."""
    monkeypatch.setattr(copying, "KEPT_CHUNK_BYTES", 100_000)
    run(place / "model", gguf_recipe(gguf_output(*RULES, {"match": "*", "keep": "bf16"}, mtp="keep")), tmp_path / "out")
    assert stored_bytes(tmp_path / "out") == stored_bytes(typed)
    losses = [json.loads((folder / "quantkit.json").read_text())["tensors"] for folder in (tmp_path / "out", typed)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert losses[0][name]["relative_loss"] == pytest.approx(losses[1][name]["relative_loss"], rel=1e-5)


def test_a_kept_value_that_float16_cannot_hold_is_one_line(place: Path, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "bad" / "model", wide_config())
    weights["lm_head.weight"][3, 5] = 1e6
    write_shards(tmp_path / "bad" / "model", weights)
    with pytest.raises(SchemeError, match=r"lm_head\.weight: 1 values are too large for F16") as caught:
        run(tmp_path / "bad" / "model", gguf_recipe(gguf_output(preset="F16")), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [None, 64])
def test_a_value_that_no_block_holds_is_told_with_its_expert(tokens: int | None, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "model", wide_config())
    write_text(tmp_path / "calibration.txt")
    weights["model.layers.1.mlp.experts.2.up_proj.weight"][5, 7] = 3e9
    write_shards(tmp_path / "model", weights)
    with pytest.raises(
        SchemeError, match=r"^model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight: .* no scale of "
    ) as caught:
        run(tmp_path / "model", gguf_recipe(gguf_output(preset="Q4_K_M"), tokens=tokens), tmp_path / "out")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- several outputs


ATTENTION = "role:attention"
Q4 = {"scheme": "Q4_0", "method": GPTQ}
Q4_RULES = [{"match": ATTENTION, **Q4}, {"match": "*.experts.*.down_proj.weight", **Q4}]
INT4 = {"match": ATTENTION, "scheme": INT4_GPTQ["scheme"], "method": {**GPTQ, "polish": 0}}


def two_formats(*names: str, **changes: Any) -> Recipe:
    made = {"gguf": gguf_output(*Q4_RULES, name="gguf", preset="F16"), "ct": compressed(INT4)}
    return gguf_recipe(*(made[name] for name in names), tokens=128, **changes)


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, bytes]]:
    """(format, whose weights carry) -> the weights and the imatrix of a conversion with this output alone."""
    folder = tmp_path_factory.mktemp("alone")
    found: dict[tuple[str, str], dict[str, bytes]] = {}
    for name in ("gguf", "ct"):
        for propagate in ("original", "quantized"):
            out = folder / f"{name}-{propagate}"
            run(place / "model", two_formats(name, propagate=propagate), out)
            found[name, propagate] = weights_of(out)
    return found


def weights_of(folder: Path) -> dict[str, bytes]:
    return {**shards_of(folder), **{path.name: path.read_bytes() for path in folder.glob("*.gguf")}}


@pytest.mark.parametrize("order", [("gguf", "ct"), ("ct", "gguf")])
@pytest.mark.parametrize("propagate", ["original", "quantized"])
def test_one_pass_gives_what_two_passes_give(
    order: tuple[str, str],
    propagate: str,
    place: Path,
    alone: dict[tuple[str, str], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """Where originals carry, for both outputs; else for the first, whose weights carry."""
    run(place / "model", two_formats(*order, propagate=propagate), tmp_path / "out")
    first, second = (weights_of(tmp_path / "out" / name) for name in order)
    assert first == alone[order[0], propagate]
    assert (second == alone[order[1], propagate]) == (propagate == "original")
    assert set(second) == set(alone[order[1], propagate])


# -------------------------------------------------------------------------------------------------------------- memory


def test_no_more_than_one_matrix_is_handed_to_a_file_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = GgufSink.write

    def measured(sink: GgufSink, tensor: QuantizedTensor, start_row: int = 0) -> None:
        sizes.append(tensor.stored["blocks"].numel())
        write(sink, tensor, start_row)

    monkeypatch.setattr(GgufSink, "write", measured)
    run(place / "model", gguf_recipe(gguf_output(preset="Q8_0")), tmp_path / "out")
    largest = max(len(data) for name, data in stored_bytes(tmp_path / "out").items() if "_exps" in name)
    matrix = 256 * 256 // 32 * 34
    assert largest == 4 * matrix
    experts = sizes.count(matrix)
    assert experts >= 12
    assert max(sizes) <= 1024 * 256 // 32 * 34  # the vocabulary's


PEAKS = """
import sys
from pathlib import Path

import torch

from tests.convert.gguf_jobs import gguf_output, gguf_recipe
from tests.convert.jobs import run

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name in ("few", "many"):
    run(folder / name, gguf_recipe(gguf_output(preset="Q8_0")), folder / f"{name}-out", memory_budget=480 * 10**6)
    status = Path("/proc/self/status").read_text()
    print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc, since getrusage counts the parent, too")
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """As many as are quantised at once, then 48 more, in one process: 48 stacked experts have 13 MB in float32, 3.4 MB
    in blocks."""
    for name, experts in (("few", MOST_EXPERTS), ("many", MOST_EXPERTS + 48)):
        write_model(tmp_path / name, wide_config(n_routed_experts=experts, num_nextn_predict_layers=0))
    # Tensors go back to the system when they are freed, so that none hides in memory that was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "32768"}
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    few, many = (1024 * int(peak) for peak in done.stdout.split())
    assert many - few < 5e6, f"{(many - few) / 1e6:.1f} MB more"
