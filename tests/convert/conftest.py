"""Fixtures of several files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.jobs import (
    write_model,
    write_text,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint "model", and the texts."""
    folder = tmp_path_factory.mktemp("job")
    write_text(folder / "calibration.txt")
    write_text(folder / "eval.txt", 200)
    write_model(folder / "model", fp8=True)
    return folder
