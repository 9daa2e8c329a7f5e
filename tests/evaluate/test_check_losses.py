"""The losses of linears as evidence: what fails, what is only noted, and where they come from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from quantkit.documents.baseline import Baseline, ConversionLosses
from quantkit.errors import EvaluationError
from quantkit.evaluate.check.baseline import read_baseline, read_evaluation, read_losses
from quantkit.evaluate.check.verdict import Limits
from tests.evaluate.evaluations import Made, evaluation
from tests.evaluate.test_check import CLEAN, failed, verdict


def losses(seed: int = 0, spread: float = 0.03, calibration: str = "a", **factors: float) -> ConversionLosses:
    """Six layers of a dense linear and sixteen experts. ``factors``: by a part of the name with _ for a dot."""
    random = np.random.default_rng(seed)
    names = [f"layers.{layer}.{part}" for layer in range(6) for part in ("o.weight", *(f"e.{e}.d" for e in range(16)))]
    found = {name: 0.01 * math.exp(spread * random.standard_normal()) for name in names}
    for part, factor in factors.items():
        for name in names:
            if part.replace("_", ".") in name:
                found[name] *= factor
    return ConversionLosses(calibration={"data": calibration}, losses=found)


def quantkit_json(calibration: object, tensors: dict[str, object]) -> dict[str, object]:
    """What a check needs of it, and what none is without."""
    size = {"output": "int4", "tensor_bytes": 8, "bpw": 4.0}
    return {"quantkit": "0.1.0", "job": {}, "recipe": {"calibration": calibration}, **size, "tensors": tensors}


@pytest.mark.parametrize("seed", range(1, 11))
def test_losses_of_clean_seeds_pass(seed: int) -> None:
    found = verdict(CLEAN, None, losses(0), losses(seed))
    assert failed(found) == []
    assert [check.name for check in found.checks[-2:]] == ["loss of a kind of linear", "loss of a linear"]


@pytest.mark.parametrize(
    ("factors", "names", "place"),
    [
        ({"o_weight": 1.25}, ["loss of a kind of linear"], "layers.*.o.weight"),
        ({"e_7_d": 2.0}, ["loss of a linear"], "e.7.d"),
        ({"3_e_7_d": 2.0}, ["loss of a linear"], "layers.3.e.7.d"),
        ({"layers": 1.5}, ["loss of a kind of linear"], "layers.*.e.*.d"),
    ],
)
def test_linears_that_got_worse_are_named(factors: dict[str, float], names: list[str], place: str) -> None:
    regressions = verdict(CLEAN, None, losses(0), losses(1, **factors)).regressions
    assert set(names) <= {check.name for check in regressions}
    assert place in next(check.place for check in regressions if check.name == names[0])


def test_losses_that_are_no_comparison_are_noted() -> None:
    def notes(found: ConversionLosses | None) -> str:
        done = verdict(CLEAN, None, losses(0), found)
        assert done.passed
        return " ".join(done.notes)

    assert "no quantkit.json" in notes(None)
    assert "calibration differs" in notes(losses(1, calibration="b", layers=2.0))
    assert "96" not in notes(losses(1))
    assert "102 linears of the baseline have no loss now" in notes(losses(1).model_copy(update={"losses": {}}))
    assert verdict(CLEAN, Limits(losses=False), losses(0), losses(1, layers=2.0)).passed


def test_losses_that_are_gone_are_noted_and_those_that_are_no_number_fail(tmp_path: Path) -> None:
    clean = losses(1)
    kept = {name: loss for name, loss in clean.losses.items() if ".o." not in name}
    fewer = verdict(CLEAN, None, losses(0), clean.model_copy(update={"losses": kept}))
    assert fewer.passed
    assert fewer.notes == ("6 linears of the baseline have no loss now, layers.0.o.weight is the first",)
    (tmp_path / "out").mkdir()
    written = quantkit_json(None, {"a": {"scheme": {}, "relative_loss": None}, "b": {"scheme": {}}})
    (tmp_path / "out" / "quantkit.json").write_text(json.dumps(written), encoding="utf-8")
    read = read_losses(evaluation(Made(path="out")), tmp_path)["int4"].losses
    assert list(read) == ["a"]
    assert math.isnan(read["a"])
    broken = verdict(CLEAN, None, losses(0), losses(1, **{"3_e_7_d": math.nan}))
    assert "layers.3.e.7.d" in {check.place for check in broken.regressions}


def test_losses_beyond_all_measure_are_compared() -> None:
    tiny, huge = (losses(1, **{"3_e_7_d": factor}) for factor in (1e-300, 1e300))
    assert failed(verdict(CLEAN, None, tiny, huge)) != []
    assert failed(verdict(CLEAN, None, huge, tiny)) == []


def test_losses_come_from_the_folder_that_was_evaluated(tmp_path: Path) -> None:
    written = quantkit_json(
        {"data": ["x"], "seed": 3}, {"a": {"scheme": {}, "relative_loss": 0.0123456}, "b": {"scheme": {}}}
    )
    for folder in ("out", "gguf"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "quantkit.json").write_text(json.dumps(written), encoding="utf-8")
    (tmp_path / "gguf" / "m.gguf").touch()
    made = [Made(name=name, path=path) for name, path in (("x", "out"), ("y", "gguf/m.gguf"), ("z", "absent"))]
    found = read_losses(evaluation(*made), tmp_path)
    assert list(found) == ["x", "y"]
    assert found["x"] == found["y"] == ConversionLosses(calibration={"data": ["x"]}, losses={"a": 0.01235})
    (tmp_path / "out" / "quantkit.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        EvaluationError, match="is not a record of a conversion of this version: quantkit: Field required"
    ):
        read_losses(evaluation(*made), tmp_path)


def test_the_baseline_there_and_back(tmp_path: Path) -> None:
    made = Baseline(evaluation=evaluation(CLEAN, seconds={"stream": 1.0}), conversions={"int4": losses(0)})
    path = tmp_path / "b.json"
    path.write_text(made.to_json(), encoding="utf-8")
    again = read_baseline(path)
    assert again.to_json() == made.to_json()
    assert again.evaluation.seconds is None
    with pytest.raises(EvaluationError, match="is a baseline of `quantkit check`, not an evaluation"):
        read_evaluation(path)
