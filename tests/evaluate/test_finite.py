"""A model that computes NaN is refused with the place where that began, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.calibrate.hidden_states import MemoryRows, RowStore
from quantkit.errors import EvaluationError
from quantkit.evaluate.compare import Model, compare
from tests.cli.test_cli import quantkit
from tests.convert.jobs import INT4_RTN, LINEARS, recipe_of, run, write_model, write_text
from tests.tiny_models import random_weights, tiny_config

CONFIG = tiny_config()
NORM = "model.layers.1.post_attention_layernorm.weight"


def in_memory(n_rows: int, length: int, width: int) -> RowStore:
    return MemoryRows(n_rows, length, width)


def model(weights: dict[str, Tensor], name: str) -> Model:
    return Model(
        weights.__getitem__,
        lambda ids: weights["model.embed_tokens.weight"][ids],
        lambda start, stop: weights["lm_head.weight"][start:stop],
        name=name,
    )


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (NORM, rf"after layer 1, first at window 0, token 0; the largest weight there is nan, in {NORM}"),
        ("model.norm.weight", r"logits are not finite, .* window 0, token 0; .* is nan, in model\.norm\.weight"),
        ("lm_head.weight", r"logits are not finite, .*\(see lm_head\.weight\), first at window 0, token 0"),
        ("model.embed_tokens.weight", r"after the embedding \(model\.embed_tokens\.weight\), first at window 1, token"),
    ],
)
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_the_place_is_named(tensor: str, said: str, side: str) -> None:
    weights = random_weights(CONFIG, dtype=torch.float32)
    tokens = torch.arange(2, 34).view(2, 16)
    broken = {**weights, tensor: weights[tensor].clone()}
    broken[tensor][tokens[1, 3] if tensor == "model.embed_tokens.weight" else 5] = torch.nan
    models = {"reference": model(weights, "reference"), "candidate": model(weights, "candidate")}
    models[side] = model(broken, side)
    with pytest.raises(EvaluationError, match=f"^{side}: .*{said}") as found:
        compare(arch_of(CONFIG), models["reference"], models["candidate"], tokens, in_memory)
    assert "\n" not in found.value.message


def overflowing(folder: Path) -> None:
    """Finite weights with products that are not."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if NORM in tensors:
            tensors[NORM].fill_(3e38)
            save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("saved", [False, True])
def test_evaluate_writes_nothing(tmp_path: Path, saved: bool) -> None:
    for name in ("source", "broken"):
        write_model(tmp_path / name)
    overflowing(tmp_path / "broken")
    write_text(tmp_path / "text.txt")
    text = ("--text", tmp_path / "text.txt", "--context", 32, "--max-windows-per-file", 2, "--device", "cpu")
    reference, options = tmp_path / "source", text
    if saved:
        assert quantkit("evaluate", reference, *text, "--save-reference", tmp_path / "file").exit_code == 0
        reference, options = tmp_path / "file", ()
    done = quantkit("evaluate", reference, tmp_path / "broken", *options, "-o", tmp_path / "scores.json")
    assert done.exit_code == 1
    assert re.search(rf"error: {tmp_path / 'broken'}: hidden states are not finite after layer 1, first", done.stderr)
    assert f"the largest weight there is 3e+38, in {NORM}. Nothing was evaluated.\nhint: " in done.stderr
    assert not (tmp_path / "scores.json").exists()


def test_validation_of_a_conversion_is_no_validation(tmp_path: Path) -> None:
    write_model(tmp_path / "source")
    overflowing(tmp_path / "source")
    recipe = recipe_of({"match": LINEARS, **INT4_RTN}, tokens=None, validated=True)
    write_text(tmp_path / "eval.txt")
    with pytest.raises(EvaluationError, match=r"source: hidden states are not finite after layer 1, first at window 0"):
        run(tmp_path / "source", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
