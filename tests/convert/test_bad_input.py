"""What a conversion refuses: one line, before the work where it can be known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.errors import CalibrationError, PlanError, QuantkitError, SourceError
from tests.convert.jobs import (
    data_free,
    int4,
    recipe_of,
    run,
    small_config,
    write_model,
)
from tests.tiny_models import write_shards

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.embed_tokens.weight",
        "model.layers.2.eh_proj.weight",
    ],
)
def test_a_weight_that_is_no_number_is_one_line(name: str, value: float, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "bad", ignore=lambda *_: ["model"])
    weights = write_model(tmp_path / "bad" / "model")
    weights[name][1, 3] = value
    write_shards(tmp_path / "bad" / "model", weights)
    with pytest.raises(SourceError) as caught:
        run(tmp_path / "bad" / "model", recipe_of(int4(kind="rtn"), tokens=64), tmp_path / "out")
    assert name in caught.value.message
    assert ".safetensors" in caught.value.message
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "bad", ignore=lambda *_: ["model"])
    write_model(tmp_path / "bad" / "model", small_config(vocab_size=40))
    with pytest.raises(CalibrationError, match="vocab_size 40"):
        run(tmp_path / "bad" / "model", recipe_of(int4()), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_what_cannot_work_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    too_wide = {"match": "*", "scheme": {"kind": "int", "bits": 4, "group_size": 96}, "method": {"kind": "rtn"}}
    cases: tuple[tuple[Any, dict[str, Any]], ...] = (
        (recipe_of(int4(), tokens=None), {}),
        (recipe_of(too_wide, tokens=None), {}),
        (recipe_of(int4(), tokens=10**6), {}),
        (recipe_of(int4()), {"memory_budget": 1000}),
        (recipe_of(int4()), {"base_dir": tmp_path}),
    )
    for recipe, options in cases:
        with pytest.raises(QuantkitError):
            run(place / "model", recipe, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(place: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(PlanError, match="torch sees no GPU"):
        run(place / "model", data_free(), tmp_path / "out", device="cuda")
