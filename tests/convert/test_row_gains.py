"""Gains of rows in whole conversions: which linears get them, and that transformers' activations ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.dataset import token_rows
from quantkit.plan.headers import read_headers
from quantkit.plan.plan import make_plan
from tests.convert.jobs import INT4_GPTQ, LINEARS, decoded, int4, recipe_of, run, small_config, write_model, write_text
from tests.tiny_models import write_shards

transformers = pytest.importorskip("transformers")

DROP_MTP = {"match": "role:mtp", "drop": True}
O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gains")
    write_text(folder / "calibration.txt")
    write_text(folder / "eval.txt", 200)
    write_model(folder / "model", small_config(), dtype=torch.float32)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_by(folder: Path, module: str, tokens: Tensor) -> Tensor:
    """What a module of transformers' model reads: (tokens, in)."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found: list[Tensor] = []
    model.get_submodule(module).register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(0, -2)))
    with torch.inference_mode():
        model(tokens)
    return found[0]


def test_what_adds_to_the_residual_gets_the_gains_of_its_outputs(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(int4(row_gains=True), DROP_MTP)
    run(place / "model", recipe_of(int4(), DROP_MTP), tmp_path / "plain")
    run(place / "model", recipe, tmp_path / "gained")
    plain, made = stored(tmp_path / "plain"), stored(tmp_path / "gained")
    inner = [name for name in plain if "layers.0.self_attn" in name and not name.startswith(O_PROJ)]
    assert len(inner) > 8
    assert all(torch.equal(plain[name], made[name]) for name in inner)
    assert torch.equal(plain[f"{O_PROJ}.weight_packed"], made[f"{O_PROJ}.weight_packed"])
    write_shards(tmp_path / "floats", decoded(tmp_path / "plain"))
    (tmp_path / "floats" / "config.json").write_text((place / "model" / "config.json").read_text())
    assert recipe.calibration is not None
    tokens = torch.from_numpy(token_rows(recipe.calibration, place / "model", place).tokens).long()
    x, y = (read_by(folder, O_PROJ, tokens).double() for folder in (tmp_path / "floats", place / "model"))
    name = f"{O_PROJ}.weight"
    own = x @ decoded(tmp_path / "plain")[name].double().T
    wanted = y @ stored(place / "model")[name].double().T
    expected = torch.stack(
        [torch.linalg.lstsq(a[:, None], b[:, None]).solution[0, 0] for a, b in zip(own.T, wanted.T, strict=True)]
    )
    scales = [one[f"{O_PROJ}.weight_scale"].double() for one in (plain, made)]
    found = (scales[1] * scales[0]).sum(1) / scales[0].square().sum(1)
    assert float((expected - 1).abs().max()) > 0.01
    assert float((found - expected).abs().max()) < 0.004  # half a step of bfloat16, and the damping


def test_types_that_cannot_take_gains_are_named_by_the_plan(place: Path) -> None:
    gptq = {"kind": "gptq", "row_gains": True}
    fp4 = {"match": "role:expert", "scheme": {"kind": "mxfp4"}, "method": gptq}
    headers = read_headers(place / "model")
    recipe = recipe_of(fp4, {"match": LINEARS, **INT4_GPTQ, "method": gptq}, DROP_MTP)
    plan = make_plan(recipe, headers.arch, headers.infos, headers.stored)
    (line,) = (line for line in plan.warnings if "row_gains" in line)
    assert line.startswith("output main: 12 linears, such as model.layers.1.mlp.experts.0.")
    assert "get no row_gains: scales of mxfp4" in line.lower()
