"""NVFP4 and MXFP4 folders: what runtimes join shares its global scale, with calibration and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit.errors import PlanError, SourceError
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.runtimes import transformers
from quantkit.schemes import Mxfp4Scheme, Nvfp4Scheme
from tests.convert.jobs import decoded, recipe_of, run, write_model, write_text
from tests.formats.test_compressed_tensors_config import INT4, is_expert, plan
from tests.tiny_models import tiny_config

LINEARS = "role:attention|mlp|shared_expert|expert"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp4")
    write_model(root / "model")
    write_text(root / "calibration.txt")
    return root


def rule(kind: str, match: str = LINEARS) -> dict[str, Any]:
    return {"match": match, "scheme": {"kind": kind}}


def stored_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tokens", [None, 256], ids=["data-free", "gptq"])
def test_what_is_joined_shares_its_global_scale(tokens: int | None, place: Path) -> None:
    out = place / f"nvfp4-{tokens}"
    report = run(place / "model", recipe_of(rule("nvfp4"), rule("nvfp4", "role:mtp"), tokens=tokens), out)
    stored, original = stored_of(out), FolderlessModel(place / "model")
    scales = {
        name.removesuffix(".weight_global_scale"): float(value)
        for name, value in stored.items()
        if name.endswith(".weight_global_scale")
    }
    assert report.outputs[0].nbytes == sum(tensor.nbytes for tensor in stored.values())
    joined = 0
    for module, scale in scales.items():
        siblings = [module]
        for first, second in (("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa")):
            if module.endswith(f".{first}"):
                siblings.append(module.removesuffix(first) + second)
                assert scales[siblings[1]] == scale, module
                joined += 1
            elif module.endswith(f".{second}"):
                siblings.append(module.removesuffix(second) + first)
        reach = max(original.reach(f"{name}.weight") for name in siblings)
        assert scale == pytest.approx(448 * 6 / reach, rel=1e-6), module
    assert joined > 10
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["format"] == "nvfp4-pack-quantized"


class FolderlessModel:
    """The original weights by name."""

    def __init__(self, folder: Path) -> None:
        self._weights = stored_of(folder)

    def reach(self, name: str) -> float:
        """The largest |weight|."""
        return float(self._weights[name].abs().max())


def test_a_conversion_to_mxfp4_comes_back(place: Path) -> None:
    report = run(place / "model", recipe_of(rule("mxfp4"), tokens=None), place / "mxfp4")
    stored, original = stored_of(place / "mxfp4"), stored_of(place / "model")
    assert report.outputs[0].nbytes == sum(tensor.nbytes for tensor in stored.values())
    linears = [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]
    weights = decoded(place / "mxfp4")
    assert len(linears) > 20
    for name in linears:
        error = (weights[name] - original[name].float()).square().sum() / original[name].float().square().sum()
        assert float(error) < 0.02, name


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_integer_layouts_refuse_it_and_say_who_stores_it(layout: str, place: Path) -> None:
    values = recipe_of(rule("nvfp4"), tokens=None).model_dump(mode="json")
    recipe = type(recipe_of()).model_validate({**values, "outputs": [{**values["outputs"][0], "format": layout}]})
    with pytest.raises(PlanError, match=f"{layout} cannot store NVFP4") as refused:
        run(place / "model", recipe, place / "refused")
    assert refused.value.hint == "format: compressed-tensors stores NVFP4."


def test_transformers_decodes_nvfp4_experts_wrongly_and_the_plan_says_so() -> None:
    def notes(scheme: Nvfp4Scheme | Mxfp4Scheme, *, experts: bool) -> list[str]:
        planned = plan(tiny_config(), lambda spec: scheme if is_expert(spec) is experts else INT4)
        return [line for line in transformers.problems(planned, "compressed-tensors") if "global scale" in line]

    assert len(notes(Nvfp4Scheme(), experts=True)) == 1
    assert notes(Nvfp4Scheme(), experts=False) == notes(Mxfp4Scheme(), experts=True) == []


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("a.weight_scale", "weight_packed has no weight_scale beside it"),
        ("a.weight_global_scale", r"weight_global_scale is missing, needed F32 \[1\]"),
    ],
)
def test_a_part_that_is_missing_is_named(damage: str, line: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stored = {
        "a.weight_packed": torch.zeros(8, 16, dtype=torch.uint8),
        "a.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.ones(1),
    }
    del stored[damage]
    save_file(stored, tmp_path / "model.safetensors")
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    with pytest.raises(SourceError, match=line):
        FolderSource(tmp_path, COMPRESSED_TENSORS.reader)
