"""Texts of sizes, times, tables and progress."""

from __future__ import annotations

import pytest

from quantkit.convert.events import StageStarted, Started, TensorDone, ValidationProgress
from quantkit.text.progress import LiveProgress
from quantkit.text.tables import both_units, duration, rough, table


def test_units() -> None:
    assert both_units(348_909_324_928) == "348.91 GB (324.95 GiB)"
    assert both_units(8_075_088) == "8.08 MB (7.70 MiB)"
    assert [duration(s) for s in (0.4, 119, 125, 7199, 12_000)] == ["0 s", "119 s", "2 min", "2 h 00 min", "3 h 20 min"]
    assert [rough(s) for s in (12_000, 36_000, 9_999_999)] == ["3 h 20 min", "10 h", "2,778 h"]


def test_table() -> None:
    assert table(("a", "long"), [("xx", "1"), ("y", "22")], rule_before_last=True).splitlines() == [
        "a   long",
        "--------",
        "xx     1",
        "--------",
        "y     22",
    ]


def test_live_progress_draws_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with LiveProgress() as progress:
        for event in (Started(2, 10, 5), StageStarted("mlp", 0, 2), TensorDone("w", None, 5), ValidationProgress(1, 2)):
            progress(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 layers" in captured.err
