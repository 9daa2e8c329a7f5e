"""Sources that are 4-bit already: decoded in the stream, or taken over code by code into the other format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import plan
from quantkit.convert import copying, dense, experts
from quantkit.errors import PlanError, SchemeError, SourceError
from quantkit.formats import open_source
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.plan.headers import LEAST_ZEROS
from quantkit.schemes import IntScheme, Mxfp4Scheme
from quantkit.text.forecast import forecast_text
from tests.convert.gguf_jobs import RTN, gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import decoded, files_of, int4, recipe_of, run, write_model, write_text
from tests.oracles.gguf_reader import read_types, read_weights

EXPERTS = "role:expert"
REPACK = {"kind": "repack"}
DROP = {"match": "role:mtp", "drop": True}
KEPT = {"match": "*", "keep": "source"}
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"kind": "int", "bits": 4, "group_size": 32},
    "mxfp4": {"kind": "mxfp4"},
    "g128": {"kind": "int", "bits": 4, "group_size": 128},
    "asymmetric": {"kind": "int", "bits": 4, "group_size": 32, "symmetric": False},
    "nvfp4": {"kind": "nvfp4"},
    "all": {"kind": "int", "bits": 4, "group_size": 32},
}
"""Name of a source -> what its experts are stored in; "all": every linear."""
GGUF_TYPE = {"int4": "Q4_0", "mxfp4": "MXFP4", "g128": "Q4_0"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sources, each with packed experts and all else in BF16, as Kimi K2-Thinking is released."""
    root = tmp_path_factory.mktemp("packed")
    write_model(root / "model", wide_config())
    write_text(root / "calibration.txt")
    write_text(root / "eval.txt", 300)
    write_model(root / "fp8-blocks", wide_config(), fp8=True)
    run(root / "fp8-blocks", recipe_of(DROP, tokens=None), root / "float8")
    for name, scheme in SCHEMES.items():
        match = "role:attention|mlp|shared_expert|expert" if name == "all" else EXPERTS
        rule = {"match": match, "scheme": scheme, "method": RTN}
        run(root / "model", recipe_of(rule, DROP, tokens=None), root / name)
    yield root
    shutil.rmtree(root)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def repack_rule(kind: str) -> dict[str, Any]:
    return {"match": EXPERTS, "scheme": kind, "method": REPACK}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.float().contiguous().view(torch.int32), other.float().contiguous().view(torch.int32))


# ------------------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "asymmetric", "float8"])
def test_a_packed_source_shows_what_evaluation_sees(name: str, place: Path) -> None:
    with open_source(place / name) as source, FolderSource(place / name, COMPRESSED_TENSORS.reader) as evaluated:
        assert source.infos() == evaluated.infos()
        packed = [tensor for tensor in source.infos() if source.stored_as(tensor)]
        assert len(packed) == (3 * 4 if name != "float8" else 3 * 4 + 2 * 5 + 2 * 3)  # all linears, or those of experts
        for tensor in source.infos():
            assert torch.equal(source.read(tensor), evaluated.read(tensor)), tensor
            assert torch.equal(source.read_on(tensor, torch.device("cpu")), evaluated.read(tensor)), tensor
        for tensor in packed:
            scheme, own = source.stored_as(tensor), source.read_stored(tensor)
            assert scheme is not None
            assert torch.equal(scheme.decode(**own), source.read(tensor)), tensor
            assert torch.equal(own["scale"], source.read_scale(tensor)), tensor


def test_the_stream_of_a_packed_source_is_the_evaluated_model(place: Path) -> None:
    """Reference and candidate of the validation are the same numbers, read by two readers."""
    report = run(place / "int4", recipe_of(DROP, tokens=None, validated=True), place / "same")
    assert report.outputs[0].validation is not None
    scores = report.outputs[0].validation.scores
    assert (scores.perplexity_ratio.mean, scores.mean_kl.mean, scores.top1.mean) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
@pytest.mark.parametrize("tokens", [None, 256], ids=["rtn", "gptq"])
def test_a_packed_source_is_quantised_anew(name: str, tokens: int | None, place: Path) -> None:
    eight = {"match": "role:expert|attention", "scheme": {"kind": "int", "bits": 8, "group_size": None}}
    others = {"int4": [int4("role:attention", "rtn" if tokens is None else "gptq"), DROP]}
    run(place / name, recipe_of(eight, DROP, others=others, tokens=tokens), place / f"{name}-{tokens}")
    made, kept = decoded(place / f"{name}-{tokens}" / "main"), decoded(place / f"{name}-{tokens}" / "int4")
    original = decoded(place / name)
    for tensor, weight in original.items():
        assert (made[tensor].float() - weight.float()).norm() <= 0.02 * weight.float().norm(), tensor
        if ".experts." in tensor:
            assert same_bits(kept[tensor], weight), tensor


def test_what_keep_source_takes_over_is_the_same_bytes(place: Path) -> None:
    run(place / "int4", recipe_of(DROP, tokens=None), place / "kept")
    before, after = stored(place / "int4"), stored(place / "kept")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sections = [json.loads((place / name / "config.json").read_text()) for name in ("int4", "kept")]
    assert sections[0] == sections[1]


def test_keep_bf16_decodes(place: Path) -> None:
    run(place / "int4", recipe_of({"match": EXPERTS, "keep": "bf16"}, DROP, tokens=None), place / "bf16")
    original = decoded(place / "int4")
    assert "quantization_config" not in json.loads((place / "bf16" / "config.json").read_text())
    for name, tensor in stored(place / "bf16").items():
        assert torch.equal(tensor, original[name].to(tensor.dtype)), name


def test_config_json_alone_tells_what_is_packed(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "int4" / "config.json", tmp_path)
    recipe = gguf_recipe(gguf_output(repack_rule("Q4_0"), KEPT))
    alone, whole = plan(tmp_path, recipe), plan(place / "int4", recipe)
    assert alone.source.stored == whole.source.stored
    assert set(alone.source.stored.values()) == {IntScheme(bits=4, group_size=32)}
    assert alone.plan.outputs[0].sizes == whole.plan.outputs[0].sizes
    shutil.copy(place / "int4" / "model.safetensors.index.json", tmp_path)
    assert plan(tmp_path, recipe).plan.source_bytes == whole.plan.source_bytes


# ------------------------------------------------------------------------------------------------------------- repack


@pytest.mark.parametrize("name", GGUF_TYPE)
def test_experts_go_to_gguf_without_rounding(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf-py decodes the same bits as compressed-tensors' layout does; nothing is quantised on the way."""

    def refuse(*_: object) -> None:
        raise AssertionError("a repack computes nothing")

    for module, function in ((dense, "quantize_group"), (experts, "quantize_experts"), (copying, "_quantize_rows")):
        monkeypatch.setattr(module, function, refuse)
    kind = GGUF_TYPE[name]
    report = run(place / name, gguf_recipe(gguf_output(repack_rule(kind), KEPT)), place / f"{name}-gguf")
    (path,) = (place / f"{name}-gguf").glob("*.gguf")
    theirs, ours = read_weights(path), decoded(place / name)
    assert theirs.keys() == ours.keys()
    assert all(same_bits(weight, theirs[tensor]) for tensor, weight in ours.items())
    types = read_types(path)
    assert {kind for tensor, (kind, _, _) in types.items() if "_exps." in tensor} == {kind}
    assert {kind for tensor, (kind, _, _) in types.items() if "attn_q_a." in tensor} == {"BF16"}
    assert (report.tokens, report.outputs[0].quantized, report.outputs[0].repacked) == (0, 0, 12)


def test_groups_get_smaller_without_rounding(place: Path) -> None:
    """int4 g128 with bfloat16 scales as int4 g32 with float32 scales."""
    narrow = {**SCHEMES["int4"], "scale_dtype": "float32"}
    run(place / "g128", recipe_of({"match": EXPERTS, "scheme": narrow, "method": REPACK}, DROP, tokens=None),
        place / "narrow")  # fmt: skip
    original, made = decoded(place / "g128"), decoded(place / "narrow")
    assert all(same_bits(weight, made[name]) for name, weight in original.items())


def test_experts_are_repacked_beside_gptq(place: Path) -> None:
    """Calibration goes through the source's experts, which every output has to the bit."""
    rules = [repack_rule("Q4_0"), {"match": "role:attention", "scheme": "Q8_0"}, KEPT]
    run(place / "int4", gguf_recipe(gguf_output(*rules), tokens=256), place / "beside")
    (path,) = (path for path in (place / "beside").glob("*.gguf") if "imatrix" not in path.name)
    theirs, ours = read_weights(path), decoded(place / "int4")
    assert all(same_bits(weight, theirs[name]) for name, weight in ours.items() if ".experts." in name)
    document = json.loads((place / "beside" / "quantkit.json").read_text())
    entry = document["tensors"]["model.layers.1.mlp.experts.0.up_proj.weight"]
    assert entry["scheme"] == {"kind": "ggml", "type": "Q4_0"}


def test_a_method_of_the_output_repacks(place: Path) -> None:
    output = gguf_output({"match": EXPERTS, "scheme": "Q4_0"}, KEPT, method=REPACK)
    found = plan(place / "int4", gguf_recipe(output))
    assert ("expert", "Q4_0 repack") in {(size.role.value, size.what) for size in found.plan.outputs[0].sizes}
    assert found.needs.hidden_states is None


def test_a_repack_is_resumed(place: Path, tmp_path: Path) -> None:
    """Killed after a layer, it goes on, and writes the bytes of an unbroken job."""
    recipe = gguf_recipe(gguf_output(repack_rule("Q4_0"), KEPT))
    run(place / "int4", recipe, tmp_path / "whole" / "out")

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if type(event).__name__ == "LayerDone":
            raise Stop

    with pytest.raises(Stop):
        run(place / "int4", recipe, tmp_path / "broken" / "out", on_event=stop)
    assert run(place / "int4", recipe, tmp_path / "broken" / "out").resumed
    models = [
        {name: content for name, content in files_of(tmp_path / job / "out").items() if name.endswith(".gguf")}
        for job in ("whole", "broken")
    ]
    assert models[0] == models[1]


# ----------------------------------------------------------------------------------------------------------- refusals


def lines_of(place: Path, name: str, *rules: dict[str, Any], **output: Any) -> str:
    with pytest.raises(PlanError) as refused:
        plan(place / name, gguf_recipe(gguf_output(*rules, **output)))
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "kind", "found", "hint"),
    [
        ("model", "Q4_0", "is BF16 in the source, nothing that Q4_0 holds without rounding", "method: {kind: rtn}"),
        ("asymmetric", "Q4_0", "is int4 g32 asymmetric in the source", "method: {kind: rtn}"),
        ("nvfp4", "MXFP4", "is NVFP4 in the source", "keep: source or bf16"),
        ("int4", "Q4_K", "is int4 g32 in the source", "Take scheme: Q4_0, method: {kind: repack}."),
        ("mxfp4", "Q4_0", "is MXFP4 in the source", "Take scheme: MXFP4, method: {kind: repack}."),
    ],
)
def test_another_grid_is_refused_in_the_plan(name: str, kind: str, found: str, hint: str, place: Path) -> None:
    line = lines_of(place, name, repack_rule(kind), KEPT)
    assert line.startswith("output main: model.layers.1.mlp.experts.0.gate_proj.weight (rule 1): ")
    assert found in line
    assert "(and 11 more tensors of this rule)" in line
    assert hint in line
    assert "\n" not in line


def test_parts_are_refused(place: Path) -> None:
    line = lines_of(place, "all", {"match": "*.kv_b_proj.weight", "scheme": "Q4_0", "method": REPACK}, KEPT)
    assert "is stored in parts, one of them transposed" in line


def test_gguf_names_the_exact_type_of_what_it_lacks(place: Path) -> None:
    line = lines_of(place, "int4", KEPT)
    assert "is int4 g32 in the source, which GGUF lacks; scheme: Q4_0, method: {kind: repack} holds" in line
    assert "keep: bf16 decodes it" in lines_of(place, "nvfp4", KEPT)


def test_a_plan_says_that_another_grid_rounds_again(place: Path) -> None:
    recipe = gguf_recipe(gguf_output({"match": EXPERTS, "scheme": "Q4_K"}, KEPT))
    found = plan(place / "int4", recipe)
    assert "tensors, 12 linears in int4 g32, " in forecast_text(found).splitlines()[0]
    (note,) = (note for note in found.plan.warnings if "second time" in note)
    assert note == (
        "output main: 12 linears, such as model.layers.1.mlp.experts.0.gate_proj.weight, are int4 g32 in the source; "
        "as Q4_K they are rounded a second time. scheme: Q4_0, method: {kind: repack} keeps their numbers exactly."
    )
    assert not any("second time" in note for note in plan(place / "model", recipe).plan.warnings)
    folder = recipe_of({"match": EXPERTS, "scheme": SCHEMES["g128"]}, DROP, tokens=None)
    (note,) = (note for note in plan(place / "int4", folder).plan.warnings if "second time" in note)
    assert note.endswith("keep: source keeps their numbers exactly.")


def test_a_scale_that_does_not_fit_is_refused_before_the_work(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "int4", tmp_path / "model")
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (1, 3)]
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        for name in names:
            if f"{name}_scale" in tensors:
                tensors[f"{name}_scale"][5, 2] = 3e-9
        save_file(tensors, path)
    recipe = gguf_recipe(gguf_output(repack_rule("Q4_0"), KEPT))
    with pytest.raises(SchemeError, match="scales are not a number in float16 exactly, such as 2.99769e-09") as refused:
        run(tmp_path / "model", recipe, tmp_path / "out")
    assert all(f"output main: {name}: 1 of 2,048 scales" in str(refused.value) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("method", ["gptq", "mxfp4", "awq", "bitsandbytes", "quark"])
def test_other_methods_are_named_and_refused(method: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=f"says '{method}'.*already quantised") as refused:
        open_source(tmp_path / "model")
    assert refused.value.hint.endswith("BF16, FP8 blocks or compressed-tensors.")


def test_a_stale_config_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((place / "int4" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="no linear is packed: it is stale"):
        open_source(tmp_path / "model")


def test_a_scale_that_is_no_number_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "int4", tmp_path / "model")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        if f"{name}_scale" in tensors:
            tensors[f"{name}_scale"][0, 0] = torch.nan
            save_file(tensors, path)
    with open_source(tmp_path / "model") as source:
        for read in (source.read, source.read_stored, source.read_scale):
            with pytest.raises(SourceError, match="1 of 2,048 values are NaN or infinite"):
                read(name)


@pytest.mark.parametrize(("name", "part"), [("int4", "packed"), ("int4", "scale"), ("mxfp4", "packed")])
def test_a_hole_in_codes_or_scales_is_refused(name: str, part: str, place: Path, tmp_path: Path) -> None:
    """47,104 weights in a row whose bytes never came."""
    shutil.copytree(place / name, tmp_path / "model")
    linear = "model.layers.1.mlp.experts.2.down_proj.weight"
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        if f"{linear}_{part}" in tensors:
            tensors[f"{linear}_{part}"][16:200] = 0
            save_file(tensors, path)
    with open_source(tmp_path / "model") as source:
        source.read(linear)
        source.refuse_zeros({linear: LEAST_ZEROS})
        for read in (source.read, source.read_stored) if part == "packed" else (source.read,):
            with pytest.raises(SourceError, match=rf"{linear}: [\d,]+ numbers in a row are zero"):
                read(linear)
        source.refuse_zeros({linear: 2**20})
        source.read_stored(linear)


def test_mxfp4_is_recognised(place: Path) -> None:
    with open_source(place / "mxfp4") as source:
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        assert source.stored_as(name) == Mxfp4Scheme()
        assert source.stored_as("model.norm.weight") is None
        rows = source.read_rows(name, [3, 1, 3])
        assert torch.equal(rows, source.read(name)[[3, 1, 3]])
