"""Compiled kernels that are older than any source are never used."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.kernels.numba import _forget_stale  # pyright: ignore[reportPrivateUsage]


def test_compiled_kernels_older_than_a_source_are_forgotten(tmp_path: Path) -> None:
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    for name, age in (("a.py", 50), ("shared.py", 20), ("__pycache__/a.f-1.nbi", 30), ("__pycache__/b.f-1.1.nbc", 10)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1_000_000 - age, 1_000_000 - age))
    _forget_stale(tmp_path)
    assert [path.name for path in cache.iterdir()] == ["b.f-1.1.nbc"]
    assert sorted(path.name for path in tmp_path.glob("*.py")) == ["a.py", "shared.py"]
