"""Kernels for processors, compiled by numba.

Numba keeps what it compiled beside the sources and looks only at a kernel's own file to see whether it is stale; but
kernels contain functions of other files. So whatever is older than the newest source is thrown away here.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def _forget_stale(folder: Path) -> None:
    newest = max(source.stat().st_mtime for source in folder.rglob("*.py"))
    for compiled in folder.rglob("__pycache__/*.nb[ci]"):
        with suppress(OSError):  # another process was faster, or the folder cannot be written: then nobody edits it
            if compiled.stat().st_mtime < newest:
                compiled.unlink()


_forget_stale(Path(__file__).parent)
