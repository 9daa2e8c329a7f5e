"""One reason to need memory or disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One reason to need memory. ``formula`` is how ``nbytes`` came about, for people."""

    what: str
    nbytes: int
    formula: str
