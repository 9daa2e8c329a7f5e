"""A piece of a shard that never came: a conversion names it, also where it is stored as zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.convert.events import Event, LayerDone
from quantkit.errors import SourceError
from quantkit.plan import headers as headers_module
from quantkit.plan.headers import LEAST_ZEROS, read_headers, zero_limits
from tests.convert.jobs import int4, recipe_of, run, small_config, write_model
from tests.tiny_models import write_shards

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(autouse=True)
def small_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For matrices of some thousand weights."""
    monkeypatch.setattr(headers_module, "LEAST_ZEROS", 4096)


def with_hole(folder: Path, name: str, start: int = 1000, length: int = 5000, **options: Any) -> Path:
    weights = write_model(folder, **options)
    weights[name].view(-1)[start : start + length] = 0
    write_shards(folder, weights)
    return folder


def recipe(*, keeps: bool = False, **changes: Any) -> Any:
    rules = [{"match": EXPERT, "keep": "bf16"}] if keeps else []
    return recipe_of(int4(kind="rtn"), *rules, tokens=None, **changes)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_hole_in_a_linear_is_refused_before_its_layer_is_done(keeps: bool, tmp_path: Path) -> None:
    source = with_hole(tmp_path / "model", EXPERT)
    done: list[Event] = []
    with pytest.raises(SourceError, match=rf"{EXPERT}: 5,000 weights in a row are zero, in rows \d+ to") as refused:
        run(source, recipe(keeps=keeps), tmp_path / "out", on_event=done.append)
    assert "\n" not in str(refused.value)
    assert [event.layer for event in done if isinstance(event, LayerDone)] == [0]
    report = run(source, recipe(keeps=keeps, allow_zeros=True), tmp_path / "out")
    assert report.resumed, "what is allowed changes no byte of the layers before"


def test_vocabularies_and_vectors_may_have_zeros(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weights = write_model(folder)
    rows, columns = weights["model.embed_tokens.weight"].shape
    weights["model.embed_tokens.weight"][5 : 5 + 4096 // columns] = 0
    weights["model.layers.1.mlp.gate.e_score_correction_bias"].zero_()
    write_shards(folder, weights)
    limits = zero_limits(read_headers(folder).arch)
    assert limits["model.embed_tokens.weight"] == max(4096, (rows // 100 + 1) * columns)
    assert limits[EXPERT] == 4096
    assert not any("norm" in name or "bias" in name for name in limits)


def test_limits_of_deepseek_v3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers_module, "LEAST_ZEROS", LEAST_ZEROS)
    shapes = {"vocab_size": 129_280, "hidden_size": 7168}
    from quantkit.arch import arch_of

    limits = zero_limits(arch_of(small_config(**shapes)))
    assert limits["lm_head.weight"] == limits["model.layers.2.shared_head.head.weight"] == 1293 * 7168
    assert limits["model.layers.1.mlp.experts.0.down_proj.weight"] == 32_768
