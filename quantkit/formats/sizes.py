"""Sizes for people."""

from __future__ import annotations


def short_size(nbytes: int) -> str:
    """ "38.8 GB", "64.0 MB", "1.5 kB" or "12 B": the largest unit of which there is one."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
