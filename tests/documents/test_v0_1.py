"""Files that version 0.1 wrote are still read, and show what they showed there. v0_1/ holds them, some tensors and
domains cut out, and what `check` and `report` of that version made of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import quantkit
from quantkit.documents.baseline import Baseline
from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.evaluation import Evaluation

FILES = Path(__file__).with_name("v0_1")
BASELINE = Path(__file__).resolve().parents[1] / "baselines" / "nano.json"
CONVERSIONS = {"w4a16": "gate-out/nano/w4a16", "Q4_K_M": "gate-out/nano/Q4_K_M", "rtn": "rtn"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files where their evaluation expects them, in the working directory."""
    shutil.copy(FILES / "evaluation.json", tmp_path)
    for name, place in CONVERSIONS.items():
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(FILES / f"{name}.json", tmp_path / place / "quantkit.json")
    for file in tmp_path.rglob("*.json"):
        os.utime(file, (1_750_000_000, 1_750_000_000))  # reports show the date
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_check_says_the_same() -> None:
    verdicts = quantkit.check("evaluation.json", BASELINE, candidates="w4a16")
    assert quantkit.text(verdicts) + "\n" == (FILES / "check.txt").read_text(encoding="utf-8")


@pytest.mark.usefixtures("folder")
def test_report_says_the_same() -> None:
    made = quantkit.report([*CONVERSIONS.values(), "evaluation.json"], markdown=True)
    assert made == (FILES / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_is_written_as_it_was(name: str) -> None:
    text = (FILES / f"{name}.json").read_text(encoding="utf-8")
    assert ConversionDocument.model_validate_json(text).to_json() == text


def test_evaluation_and_baseline_are_written_as_they_were() -> None:
    text = (FILES / "evaluation.json").read_text(encoding="utf-8")
    assert Evaluation.model_validate_json(text).to_json() == text
    text = BASELINE.read_text(encoding="utf-8")
    assert Baseline.model_validate_json(text).to_json() == text
