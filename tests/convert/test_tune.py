"""Layers that are tuned: what lies in the files has the loss that was promised, a resumed job gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.calibrate.dataset import token_rows
from quantkit.convert.events import Event, LayerDone, LayerTuned, TuningStep
from quantkit.errors import CalibrationError, RecipeError
from quantkit.formats import open_source
from quantkit.plan.recipe import Recipe
from quantkit.tuning.tune import split_rows
from tests.convert.gguf_jobs import decoded_gguf, gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import decoded, files_of, int4, recipe_of, run, small_config, write_model, write_text
from tests.oracles.forward import forward_layer

pytestmark = pytest.mark.usefixtures("one_thread")
TUNE: dict[str, Any] = {"epochs": 4, "lr": 0.001, "step_tokens": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_text(folder / "calibration.txt")
    write_model(folder / "model")
    write_model(folder / "wide", wide_config())
    return folder / "model"


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quantkit.json").read_text())["tuning"]
    return found


def originals(source: Path) -> dict[str, Tensor]:
    with open_source(source) as opened:
        return {name: opened.read(name).float() for name in opened.infos()}


def held_out_losses(
    source: Path, config: dict[str, Any], recipe: Recipe, stored: dict[str, Tensor], alpha: float
) -> list[float]:
    """Of each layer: squared error of its output on held-out rows, by what the target adds to the layer's input."""
    original = originals(source)
    assert recipe.calibration is not None
    tokens = torch.from_numpy(token_rows(recipe.calibration, source, source.parent).tokens).long()
    held, _ = split_rows(len(tokens))
    arch, losses = arch_of(config), list[float]()
    own = far = torch.nn.functional.embedding(tokens, original[arch.embed])
    for layer in range(arch.n_layers):
        sublayers, x = arch.sublayers(layer), own
        far = forward_layer(sublayers, original.__getitem__, far)
        near = forward_layer(sublayers, original.__getitem__, x)
        own = forward_layer(sublayers, stored.__getitem__, x)
        target = alpha * far + (1 - alpha) * near
        losses.append(float((own - target)[held].square().sum() / (target - x)[held].square().sum()))
    return losses


@pytest.mark.parametrize(
    ("tune", "scheme"),
    [
        (TUNE, {"kind": "int", "bits": 3, "group_size": 64}),
        ({**TUNE, "alpha": 0.5, "optimizer": "adam"}, {"kind": "int", "bits": 2, "group_size": 32, "symmetric": False}),
        ({**TUNE, "alpha": 0.0}, {"kind": "mxfp4"}),
    ],
    ids=["int3", "int2 adam", "mxfp4"],
)
def test_the_files_have_the_loss_that_was_found(
    source: Path, tmp_path: Path, tune: dict[str, Any], scheme: dict[str, Any]
) -> None:
    rule = {"match": "role:attention|mlp|shared_expert|expert", "scheme": scheme, "method": {"kind": "gptq", "grid": 8}}
    recipe, events = recipe_of(rule, tune=tune, tokens=512), list[Event]()
    run(source, recipe, tmp_path / "out", on_event=events.append)
    found, stored = record(tmp_path / "out"), decoded(tmp_path / "out")
    losses = held_out_losses(source, small_config(), recipe, stored, tune.get("alpha", 0.5))
    assert [found[str(layer)]["loss_after"] for layer in (0, 1)] == pytest.approx(losses, rel=1e-3)
    assert any(one["loss_after"] < one["loss_before"] for one in found.values())
    changed_codes = sum(one["codes_changed"] for one in found.values())
    assert changed_codes < sum(one["codes"] for one in found.values())
    assert (changed_codes > 0) == (scheme["kind"] == "int")  # so few updates carry no code over FP4's wide steps
    tuned = [event for event in events if isinstance(event, LayerTuned)]
    assert [(one.layer, one.after) for one in tuned] == [(layer, found[str(layer)]["loss_after"]) for layer in (0, 1)]
    steps = [event for event in events if isinstance(event, TuningStep)]
    assert (steps[-1].done, steps[-1].total) == (28, 28)
    plain = originals(source)
    kept = [layer for layer in (0, 1) if found[str(layer)]["epoch"]]
    norms = [name for name in stored if "norm" in name and any(f".layers.{layer}." in name for layer in kept)]
    changed = [not torch.equal(stored[name].float(), plain[name]) for name in norms]
    assert changed
    assert all(changed)


def test_a_job_that_was_interrupted_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, LayerDone):
            raise Stopped

    recipe = recipe_of(int4(grid=2, polish=0), tune=TUNE, tokens=256)
    run(source, recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(source, recipe, tmp_path / "out", on_event=stop)
    assert run(source, recipe, tmp_path / "out").resumed
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_blocks_of_ggml_and_their_parts(source: Path, tmp_path: Path) -> None:
    rules = [
        {"match": "role:embed|lm_head", "keep": "f32"},
        {"match": "*kv_b_proj*", "scheme": "IQ4_NL"},
        {"match": "role:shared_expert", "scheme": "IQ3_XXS"},
        {"match": "*down_proj*", "scheme": "Q2_K"},
        {"match": "role:attention|mlp|expert", "scheme": "Q4_K"},
        {"match": "*", "keep": "f32"},
    ]
    recipe = gguf_recipe(gguf_output(*rules, method={"kind": "gptq", "polish": 0}), tokens=512, tune=TUNE)
    run(source.parent / "wide", recipe, tmp_path / "out")
    found = record(tmp_path / "out")
    stored = decoded_gguf(tmp_path / "out")
    losses = held_out_losses(source.parent / "wide", wide_config(), recipe, stored, 0.5)
    assert [found[str(layer)]["loss_after"] for layer in (0, 1)] == pytest.approx(losses, rel=2e-3)
    assert any(one["loss_after"] < one["loss_before"] for one in found.values())


def test_what_did_not_help_is_not_kept(source: Path, tmp_path: Path) -> None:
    """Steps so large that no epoch is better than GPTQ."""
    recipe = recipe_of(int4(grid=2, polish=0), tune={**TUNE, "lr": 0.1, "scale_lr": 0.1, "epochs": 1}, tokens=256)
    run(source, recipe, tmp_path / "out")
    run(source, recipe_of(int4(grid=2, polish=0), tokens=256), tmp_path / "plain")
    kept = [one["epoch"] for one in record(tmp_path / "out").values()]
    assert kept == [0, 0]
    tensors = (decoded(tmp_path / name) for name in ("out", "plain"))
    assert all(torch.equal(own, other) for own, other in zip(*(one.values() for one in tensors), strict=True))


REFUSED = {
    "data-free": ({"tokens": None}, "found tune in a data-free recipe, needed calibration"),
    "original": ({"propagate": "original"}, "found tune and propagate: original, needed propagate: quantized"),
    "outputs": ({"others": {"second": [int4()]}}, "found tune and 2 outputs, needed one"),
}


@pytest.mark.parametrize(("changes", "line"), REFUSED.values(), ids=REFUSED.keys())
def test_recipes_that_cannot_be_tuned(changes: dict[str, Any], line: str) -> None:
    values = recipe_of(int4(kind="rtn" if "tokens" in changes else "gptq"), **changes).model_dump(exclude_unset=True)
    with pytest.raises(RecipeError, match=line):
        Recipe.from_dict({**values, "tune": True})


def test_awq_is_refused() -> None:
    rule = {"match": "role:expert", "scheme": {"kind": "int"}, "method": {"kind": "awq"}}
    with pytest.raises(RecipeError, match="found tune and awq, which rescales channels, needed gptq or rtn"):
        Recipe.from_dict({**recipe_of(rule).model_dump(exclude_unset=True), "tune": {}})


def test_one_row_is_too_few(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="found 1 calibration row, needed at least 2"):
        run(source, recipe_of(int4(), tune={}, tokens=32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_true_and_false_are_values() -> None:
    plain = recipe_of(int4()).model_dump(exclude_unset=True)
    assert Recipe.from_dict({**plain, "tune": False}).tune is None
    tuned = Recipe.from_dict({**plain, "tune": True})
    assert tuned.tune is not None
    assert tuned == Recipe.from_dict(plain).tuned() == tuned.tuned()
