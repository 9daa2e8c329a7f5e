"""Sequences longer than a model is made for: a note in plan and convert, refused by evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit import evaluate
from quantkit.errors import PlanError
from quantkit.plan.forecast import forecast
from quantkit.plan.recipe import Recipe
from tests.convert.jobs import INT4_GPTQ, write_model, write_text
from tests.tiny_models import tiny_config

MOST = tiny_config()["max_position_embeddings"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths")
    write_model(folder / "model")
    write_text(folder / "text.txt", 3 * MOST)
    return folder


def recipe(length: int, context: int) -> Recipe:
    calibration = {"data": ["text.txt"], "tokens": 64, "sequence_length": length}
    validation = {"text": ["text.txt"], "context": context, "max_windows_per_file": 1}
    rules = [{"match": "role:expert", **INT4_GPTQ}, {"match": "*", "keep": "source"}]
    outputs: list[dict[str, Any]] = [{"name": "main", "format": "compressed-tensors", "rules": rules}]
    document = {"version": 1, "calibration": calibration, "validation": validation, "outputs": outputs}
    return Recipe.model_validate(document)


@pytest.mark.parametrize(
    ("length", "context", "said"),
    [
        (MOST + 1, 32, "calibration: sequence_length"),
        (32, MOST + 1, "validation: context"),
    ],
)
def test_of_a_recipe(folder: Path, length: int, context: int, said: str) -> None:
    note = f"{said} {MOST + 1:,}: the model is made for at most {MOST:,} tokens (max_position_embeddings)."
    assert note in forecast(folder / "model", recipe(length, context), base_dir=folder).warnings
    assert not any(said in line for line in forecast(folder / "model", recipe(MOST, MOST), base_dir=folder).warnings)


def test_of_an_evaluation(folder: Path) -> None:
    with pytest.raises(PlanError, match=rf"--context {MOST + 1:,}: the model is made for at most {MOST:,}"):
        evaluate(folder / "model", [folder / "model"], context=MOST + 1, text=(str(folder / "text.txt"),))
