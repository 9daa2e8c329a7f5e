"""Sequences longer than a model is made for: a note in plan and convert, refused by evaluate. Longer than is computed
exactly: refused by all, before any work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from quantkit import convert, evaluate
from quantkit.errors import PlanError
from quantkit.plan.forecast import forecast
from quantkit.plan.recipe import Recipe
from quantkit.runtimes.gpus import parse_gpus
from quantkit.runtimes.vllm.memory import Fit
from tests.arch.relatives import deepseek_v32, glm_moe_dsa
from tests.convert.jobs import INT4_GPTQ, write_model, write_text
from tests.tiny_models import tiny_config

SHORT: dict[str, Any] = {"max_windows_per_file": 2}
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


TOP_K = 40


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5.2's kind: a layer that attends to the keys of the layer before it."""
    folder = tmp_path_factory.mktemp("shared")
    config = glm_moe_dsa(vocab_size=1024, index_topk=TOP_K, indexer_types=["full", "shared", "full"])
    write_model(folder / "model", config)
    write_text(folder / "text.txt", 3 * MOST)
    return folder


@pytest.mark.parametrize(
    ("length", "context", "said"),
    [(TOP_K + 1, TOP_K, "calibration: sequence_length 41:"), (TOP_K, TOP_K + 1, "validation: context 41:")],
)
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_shared_indexers_are_exact_up_to_top_k(
    shared: Path, tmp_path: Path, command: str, length: int, context: int, said: str
) -> None:
    start = forecast if command == "plan" else partial(convert, out=tmp_path / "out")
    with pytest.raises(PlanError, match=f"{said} some layers .* up to 40 tokens only") as caught:
        start(shared / "model", recipe=recipe(length, context), base_dir=shared)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_shared_indexers(shared: Path) -> None:
    with pytest.raises(PlanError, match="--context 41: some layers"):
        evaluate(shared / "model", [shared / "model"], context=TOP_K + 1, text=(str(shared / "text.txt"),))
    evaluate(shared / "model", [shared / "model"], context=TOP_K, text=(str(shared / "text.txt"),), **SHORT)


def test_dense_windows_of_sparse_attention_are_noted(tmp_path: Path) -> None:
    write_model(tmp_path / "model", deepseek_v32(vocab_size=1024, index_topk=TOP_K))
    write_text(tmp_path / "text.txt", 3 * MOST)
    made = forecast(tmp_path / "model", recipe(TOP_K, TOP_K + 1), base_dir=tmp_path, gpus=parse_gpus("1xA100-80GB"))
    dense = "attention is dense up to 40 tokens (index_topk)"
    assert [line.split(":")[0] for line in made.warnings if dense in line] == ["calibration"]
    assert any("vLLM 0.33 has kernels of sparse attention" in line for line in made.warnings)
    assert made.fits is not None
    assert isinstance(found := made.fits[0].fit, Fit)
    assert found.placement is None
    assert found.refused[0].startswith("A100-80GB: vLLM 0.33 has kernels of sparse attention for compute capability 9")
    (on_h100,) = (
        forecast(tmp_path / "model", recipe(TOP_K, TOP_K), base_dir=tmp_path, gpus=parse_gpus("1xH100-80GB")).fits or ()
    )
    assert on_h100.fits
