"""What `inspect` says about sources, about outputs, and about folders that are odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import SourceError
from quantkit.inspect.folder import inspect_folder
from quantkit.text.inspection import inspection_document, inspection_text
from tests.convert.jobs import LINEARS, recipe_of, run, write_model
from tests.formats.test_other_packages import golden, write
from tests.tiny_models import tiny_config, write_checkpoint


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_float8_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=1), fp8=True)
    found = inspect_folder(tmp_path)
    assert found.unusual == ()
    assert (found.family, found.quantization, found.shards) == ("DeepseekV3ForCausalLM", "fp8", 3)
    rows = {(holding.role, holding.what): holding for holding in found.holdings}
    assert rows["expert", "fp8 block"].weights == 2 * 12 * 3
    assert rows["expert", "fp8 block"].bpw == pytest.approx(8 + 32 / 128**2)
    assert ("router", "f32") in rows
    assert found.nbytes == sum(tensor.stat().st_size for tensor in tmp_path.glob("*.safetensors")) - headers(tmp_path)


def headers(folder: Path) -> int:
    """Bytes of all headers."""
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def test_packed_output(tmp_path: Path) -> None:
    """Tensors as compressed-tensors stores them; the scheme is read off the shapes."""
    config = tiny_config(num_hidden_layers=1, num_nextn_predict_layers=0)
    weights = write_checkpoint(tmp_path / "source", config)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if ".mlp." not in name:
            packed[name] = tensor
            continue
        out_features, in_features = tensor.shape
        packed[f"{name}_packed"] = torch.zeros(out_features, in_features // 8, dtype=torch.int32)
        packed[f"{name}_scale"] = torch.ones(out_features, in_features // 64, dtype=torch.bfloat16)
        packed[f"{name}_shape"] = torch.tensor([out_features, in_features])
    out = tmp_path / "out"
    out.mkdir()
    save_file(packed, out / "model.safetensors")
    (out / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "compressed-tensors"}})
    )
    found = inspect_folder(out)
    assert [(h.role, h.what, h.weights) for h in found.holdings if h.role == "mlp"] == [("mlp", "int4 g64", 3)]
    assert found.unusual == ()
    name = "model.layers.0.mlp.up_proj.weight"
    del packed[f"{name}_scale"]
    save_file(packed, out / "model.safetensors")
    assert any(line.startswith(f"{name}: stored as") for line in inspect_folder(out).unusual)


def test_what_a_runtime_does_is_no_more_than_a_note(tmp_path: Path) -> None:
    """Groups of 16 load in vLLM, by another kernel than most."""
    config = tiny_config(num_hidden_layers=1, num_nextn_predict_layers=0)
    write_model(tmp_path / "source", config)
    rule = {"match": LINEARS, "scheme": {"kind": "int", "bits": 4, "group_size": 16}, "method": {"kind": "rtn"}}
    run(tmp_path / "source", recipe_of(rule, tokens=None), tmp_path / "out")
    found = inspect_folder(tmp_path / "out")
    assert found.unusual == ()
    assert any("Marlin kernels take group_size" in line for line in found.notes)
    shown = inspection_text(found)
    assert "nothing unusual\nnote: " in shown
    assert inspection_document(found)["notes"] == list(found.notes)


@pytest.mark.parametrize(
    ("scheme", "notes"),
    [
        ({"kind": "int", "bits": 4, "group_size": 32}, ("SGLang, ktransformers (RAWINT4) and MLX read this.",)),
        ({"kind": "int", "bits": 4, "group_size": 128}, ("of compressed-tensors mlx-lm 0.32 reads int4 g32 alone",)),
        ({"kind": "w4afp8"}, ("vLLM has kernels for it on Hopper alone", "mlx-lm 0.32 reads int4 g32 alone")),
    ],
)
def test_runtimes_are_named_as_in_a_plan(tmp_path: Path, scheme: dict[str, object], notes: tuple[str, ...]) -> None:
    """That inputs are rounded to FP8 is said in config.json alone."""
    config = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=0, moe_intermediate_size=128)
    write_model(tmp_path / "source", config)
    rule = {"match": "role:expert", "scheme": scheme, "method": {"kind": "rtn"}}
    recipe = recipe_of(rule, {"match": "*", "keep": "source"}, tokens=None)
    run(tmp_path / "source", recipe, tmp_path / "out")
    found = inspect_folder(tmp_path / "out")
    assert all(any(text in line for line in found.notes) for text in notes)
    (experts,) = (holding.what for holding in found.holdings if holding.role == "expert")
    assert experts.endswith("FP8 inputs") is (scheme["kind"] == "w4afp8")


def test_unusual(tmp_path: Path) -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    write_checkpoint(tmp_path, config)
    edit_config(tmp_path, num_nextn_predict_layers=1)
    assert [line for line in inspect_folder(tmp_path).unusual if "no MTP layer" in line]
    edit_config(tmp_path, num_nextn_predict_layers=0, num_hidden_layers=2)
    (line,) = inspect_folder(tmp_path).unusual
    assert "tensors that the architecture does not have: model.layers.2." in line
    edit_config(tmp_path, num_hidden_layers=3, hidden_size=256)
    assert any("whose shape does not fit config.json" in line for line in inspect_folder(tmp_path).unusual)
    edit_config(tmp_path, hidden_size=128, quantization_config={"quant_method": "fp8"})
    assert inspect_folder(tmp_path).unusual == (
        "config.json says fp8, but no weight is quantised: quantization_config is stale.",
    )
    edit_config(tmp_path, quantization_config=None, scoring_func="softmax")
    assert any("scoring_func" in line for line in inspect_folder(tmp_path).unusual)
    (tmp_path / "config.json").unlink()
    found = inspect_folder(tmp_path)
    assert (found.family, {holding.role for holding in found.holdings}) == ("", {"-"})
    assert found.unusual[0].startswith("no config.json")


def test_router_bias_in_bf16_is_unusual(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=0), shards=1)
    save_file(
        {name: tensor.bfloat16().contiguous() for name, tensor in weights.items()},
        tmp_path / "model-00001-of-000001.safetensors",
    )
    (line,) = inspect_folder(tmp_path).unusual
    assert line.startswith("2 tensors that the official release stores in float32")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        inspect_folder(tmp_path / "none")


@pytest.mark.parametrize(("kind", "case"), [("gptq", "w3_g32_sym_gptq"), ("awq", "g32")])
def test_linears_whose_tensors_are_named_otherwise_are_one_weight(kind: str, case: str, tmp_path: Path) -> None:
    section, stored, _ = golden(kind, case)
    inspection = inspect_folder(write(tmp_path, section, stored))
    packed = next(holding for holding in inspection.holdings if holding.what == kind)
    assert (packed.weights, packed.parameters) == (1, 32 * 96)
    assert packed.nbytes == sum(tensor.nbytes for tensor in stored.values())
    stored["qzeros"] = stored["qzeros"][:1]
    assert any("qzeros is I32" in line for line in inspect_folder(write(tmp_path, section, stored)).unusual)


def test_fp4_is_told_by_its_tensors(tmp_path: Path) -> None:
    stored = {
        "a.weight_packed": torch.zeros(8, 16, dtype=torch.uint8),
        "a.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.ones(1),
        "b.weight_packed": torch.zeros(8, 32, dtype=torch.uint8),
        "b.weight_scale": torch.ones(8, 2, dtype=torch.uint8),
    }
    save_file(stored, tmp_path / "model.safetensors")
    found = {holding.what: holding.parameters for holding in inspect_folder(tmp_path).holdings}
    assert found == {"NVFP4": 8 * 32, "MXFP4": 8 * 64}


def test_weights_of_no_known_scheme_are_one_line(tmp_path: Path) -> None:
    """Codes of a byte each beside scales, as compressed-tensors' int-quantized has them."""
    stored = {f"{name}.weight": torch.zeros(8, 128, dtype=torch.int8) for name in ("a", "b", "c")}
    save_file({**stored, **{f"{name}_scale": torch.ones(8, 1) for name in stored}}, tmp_path / "model.safetensors")
    (line,) = (line for line in inspect_folder(tmp_path).unusual if "scheme" in line)
    assert line == "a.weight and 2 more: stored as a.weight I8, a.weight_scale F32, which fits no known scheme."


def test_mxfp8_is_told_from_blocks_by_its_scales(tmp_path: Path) -> None:
    codes = torch.zeros(8, 128).to(torch.float8_e4m3fn)
    save_file(
        {"a.weight": codes, "a.weight_scale": torch.zeros(8, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors"
    )
    (holding,) = inspect_folder(tmp_path).holdings
    assert (holding.what, holding.nbytes) == ("MXFP8", 8 * 132)
