"""Conversions by AWQ: folding leaves the model as it was; both formats; with GPTQ after it; resumed; few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.convert import hidden as hidden_module
from quantkit.convert.events import Event, LayerDone
from quantkit.errors import PlanError
from quantkit.formats import open_source
from quantkit.formats.source import read_config
from quantkit.quantizers import Awq
from tests.convert.gguf_jobs import decoded_gguf, gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import LINEARS, decoded, files_of, recipe_of, run, small_config, write_model, write_text
from tests.convert.unrounded import decoded_plainly, kept, write_unrounded
from tests.oracles.forward import logits

NANO = Path(__file__).parents[2] / "examples" / "nano-deepseek-v3"
NORM = "model.layers.1.post_attention_layernorm.weight"
RTN: dict[str, Any] = {"kind": "rtn", "grid": 4}
GPTQ: dict[str, Any] = {"kind": "gptq", "grid": 4, "polish": 0}


def awq(then: dict[str, Any] = RTN, match: str = LINEARS, **scheme: Any) -> dict[str, Any]:
    """A rule: int4 in groups of 64, a small grid."""
    chosen = {"kind": "int", "bits": 4, "group_size": 64, **scheme}
    return {"match": match, "scheme": chosen, "method": {"kind": "awq", "grid": 3, "then": then}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("awq")
    write_text(root / "calibration.txt")
    return root


def relative_error(found: Tensor, weight: Tensor) -> float:
    return float((found.float() - weight.float()).norm() / weight.float().norm())


def test_folding_alone_leaves_the_logits_of_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "calibration.txt", 200)
    (tmp_path / "nano").symlink_to(NANO)
    with open_source(NANO) as source:
        weights = {name: source.read(name).float() for name in source.infos()}
    arch = arch_of(read_config(NANO))
    write_unrounded(monkeypatch)
    monkeypatch.setattr(Awq, "quantizer", lambda self, stats: kept)
    recipe = recipe_of(awq(), {"match": "role:mtp", "drop": True}, {"match": "*", "keep": "f32"}, tokens=128)
    run(tmp_path / "nano", recipe, tmp_path / "folded")
    folded: Mapping[str, Tensor] = {name: own.float() for name, own in decoded_plainly(tmp_path / "folded").items()}
    changed = {name.split(".", 3)[-1] for name, own in folded.items() if not torch.equal(own, weights[name])}
    assert {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"} <= changed
    tokens = torch.randint(arch.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    found, expected = (logits(arch, one.__getitem__, tokens) for one in (folded, weights))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_folders_and_gguf_in_one_pass(place: Path) -> None:
    """Both find factors; what they decode to, unfolded by what their norms and rows of up say, is the source's."""
    weights = write_model(place / "wide", wide_config())
    method = {"kind": "awq", "grid": 3, "then": "gptq"}
    outputs = (
        gguf_output({"match": "role:attention|mlp|expert|shared_expert", "scheme": "Q8_0"},
                    {"match": "*", "keep": "source"}, name="gguf", method=method),
        {"name": "folder", "format": "compressed-tensors", "rules": [awq(bits=8), {"match": "*", "keep": "source"}]},
    )  # fmt: skip
    run(place / "wide", gguf_recipe(*outputs, tokens=256), place / "wide-out")
    for found in (decoded_gguf(place / "wide-out" / "gguf"), decoded(place / "wide-out" / "folder")):
        own = weights[NORM].float() / found[NORM].float()
        assert float(own.std()) > 0.01
        for name in ("mlp.experts.2.gate_proj.weight", "mlp.shared_experts.gate_proj.weight", "mlp.gate.weight"):
            read = weights[f"model.layers.1.{name}"]
            assert relative_error(found[f"model.layers.1.{name}"].float() / own, read) < 0.02, name
        up, down = (f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("up", "down"))
        rescaled, original = found[up].float() / own, weights[up].float()
        hidden = original.norm(dim=1) / rescaled.norm(dim=1)  # rows of up are divided for down
        assert float(hidden.std()) > 0.01
        assert relative_error(rescaled * hidden[:, None], original) < 0.02
        assert relative_error(found[down].float() / hidden, weights[down]) < 0.02


def test_a_resumed_job_gives_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(place / "resumed", small_config(num_nextn_predict_layers=0))
    monkeypatch.setattr(hidden_module, "SAVING_PAUSE", 0)
    recipe = recipe_of(awq(GPTQ))
    run(place / "resumed", recipe, place / "unbroken")

    def stop(event: Event) -> None:
        if isinstance(event, LayerDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place / "resumed", recipe, place / "broken", on_event=stop)
    run(place / "resumed", recipe, place / "broken")
    assert files_of(place / "broken") == files_of(place / "unbroken")


def test_experts_without_tokens(place: Path) -> None:
    """Many experts, few tokens, none borrowed: those without keep their own scales and say nothing wrong."""
    config = small_config(n_routed_experts=32, n_group=1, topk_group=1, num_nextn_predict_layers=0)
    weights = write_model(place / "many", config)
    recipe = recipe_of(awq(), calibration={"data": ["calibration.txt"], "tokens": 4, "sequence_length": 4,
                                           "min_expert_tokens": 0})  # fmt: skip
    run(place / "many", recipe, place / "many-out")
    found = decoded(place / "many-out")
    unseen = 0
    for expert in range(32):
        up, down = (f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight" for name in ("up", "down"))
        assert bool(found[down].isfinite().all())
        unseen += relative_error(found[down], weights[down]) < 0.2
    assert unseen >= 16, "at most 8 of 32 experts have tokens"


def test_of_the_readers_of_a_norm_one_method_rescales(place: Path) -> None:
    """Experts by AWQ, the shared expert by GPTQ: that one is folded too, and quantised as it then is."""
    weights = write_model(place / "mixed")
    rules = (awq(match="role:expert"), {**awq(match="role:attention|mlp|shared_expert", bits=8), "method": GPTQ})
    run(place / "mixed", recipe_of(*rules), place / "mixed-out")
    found = decoded(place / "mixed-out")
    reader = "model.layers.1.mlp.shared_experts.gate_proj.weight"
    factors = weights[NORM].float() / found[NORM].float()
    assert float(factors.std()) > 0.01
    assert relative_error(found[reader].float() / factors, weights[reader]) < 0.02


def test_awq_on_a_grid_with_a_shared_scale_is_refused_in_the_plan(tmp_path: Path) -> None:
    """Linears that runtimes join have one global scale, taken from how far all of them reach."""
    rule = {"match": LINEARS, "scheme": {"kind": "nvfp4"}, "method": {"kind": "awq"}}
    write_model(tmp_path / "model")
    write_text(tmp_path / "calibration.txt")
    with pytest.raises(PlanError, match=r"awq changes how far its weights reach, and NVFP4 shares a scale.*Take gptq"):
        run(tmp_path / "model", recipe_of(rule), tmp_path / "out")
