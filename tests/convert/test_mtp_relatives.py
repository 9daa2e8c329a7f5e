"""MTP layers of the families with indexers and of GLM-4.7-Flash, calibrated and kept: what methods are given, and what
evaluations say of their drafts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import evaluate
from quantkit.arch import arch_of
from quantkit.calibrate.dataset import eval_windows
from quantkit.calibrate.inputs import InputStats
from quantkit.convert import dense as dense_module
from quantkit.convert import experts as experts_module
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.quantizers import Gptq
from tests.arch.relatives import deepseek_v32, glm4_moe_lite, glm_moe_dsa
from tests.arch.test_mtp import drafted
from tests.convert.jobs import decoded, int4, recipe_of, run, write_model, write_text
from tests.convert.layer_case import assert_given, noting
from tests.convert.test_mtp import entrance, tokens_of
from tests.oracles import forward
from tests.oracles.layer import Settings, expected_statistics
from tests.tiny_models import write_shards

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": 1024, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}
MTP, CONTEXT, CHOICES = 3, 32, 6
PREFIX = f"model.layers.{MTP}."
FAMILIES: dict[str, Callable[..., dict[str, Any]]] = {
    "deepseek_v32": partial(deepseek_v32, index_topk=20),
    "glm_moe_dsa": partial(glm_moe_dsa, index_topk=20),
    "glm4_moe_lite": partial(glm4_moe_lite, rms_norm_eps=1e-6),
}


@pytest.fixture(params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    config = FAMILIES[request.param](**SMALL)
    write_text(tmp_path / "calibration.txt")
    weights = write_model(tmp_path / "model", config)
    for name in ("lm_head.weight", f"{PREFIX}shared_head.head.weight"):
        weights[name][CHOICES:] *= 2**-10  # so few that draft and model often agree
    write_shards(tmp_path / "model", weights)
    write_text(tmp_path / "eval.txt", 200)
    return tmp_path, config, {name: weight.float() for name, weight in weights.items()}


def test_gptq_is_given_what_a_plain_forward_gives(
    place: tuple[Path, dict[str, Any], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With quantised layers before, and more tokens in a row than the indexers choose."""
    folder, config, original = place
    recipe = recipe_of(int4("role:mtp", grid=2, polish=0), int4(grid=2, polish=0), tokens=128)
    given: dict[str, InputStats] = {}
    with monkeypatch.context() as patch:
        for module in (dense_module, experts_module):
            patch.setattr(module, "quantize_linears", noting(given, original))
        run(folder / "model", recipe, folder / "out")
    with FolderSource(folder / "out", COMPRESSED_TENSORS.reader) as written:
        carried = {name: written.read(name).float() for name in written.infos()}
    tokens = tokens_of(recipe, folder)
    x, x_original = (
        entrance(config, weights.__getitem__, original.__getitem__, tokens, MTP) for weights in (carried, original)
    )
    method = Gptq()
    assert recipe.calibration is not None
    least = recipe.calibration.min_expert_tokens
    settings = Settings(original.__getitem__, carried.__getitem__, least, method.shrink, method.down_shrink)
    expected = expected_statistics(arch_of(config).sublayers(MTP), settings, x, x_original)
    own = {name: stats for name, stats in given.items() if name.startswith(PREFIX)}
    assert own.keys() == {spec.name for spec in arch_of(config).tensors() if spec.linear and spec.layer == MTP}
    assert_given(own, expected, tolerance=2e-5)


def test_evaluations_say_how_often_drafts_are_right(place: tuple[Path, dict[str, Any], dict[str, Tensor]]) -> None:
    """As a plain forward pass has it, of the original and of what was written."""
    folder, config, original = place
    report = run(folder / "model", recipe_of(int4(grid=2, polish=0), tokens=128, validated=True), folder / "out")
    found = evaluate(folder / "model", [folder / "out"], context=CONTEXT, text=[str(folder / "eval.txt")])
    (candidate,) = json.loads(found.to_json())["candidates"]
    windows = eval_windows([str(folder / "eval.txt")], CONTEXT, folder / "model", folder)
    tokens = torch.from_numpy(windows.tokens).long()
    for name, weights in (("reference", original), ("candidate", decoded(folder / "out"))):
        expected = _right(config, weights, tokens)
        assert 0.05 < expected < 0.6
        assert candidate["result"]["draft"][name]["mean"] == pytest.approx(expected, abs=3 / tokens.numel())
    validation = report.outputs[0].validation
    assert validation is not None
    assert validation.scores.draft is not None
    assert validation.scores.draft.reference is not None


def _right(config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> float:
    """Share of positions where the MTP layer puts the token first that the model puts first one position later."""
    with torch.inference_mode():
        logits = forward.logits(arch_of(config), lambda name: weights[name].float(), tokens)
    return (drafted(config, weights, tokens).argmax(-1) == logits.argmax(-1)[:, 1:]).double().mean().item()
