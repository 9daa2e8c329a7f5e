"""What every inspection reports: weights by role and by how they are stored, and lists of names."""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN_ROLE = "-"
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class StorageSummary:
    """Weights of one role that are stored the same way. ``nbytes``: with scales and shapes."""

    role: str
    what: str
    weights: int
    parameters: int
    nbytes: int

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


def counted(text: str, names: list[str]) -> str:
    """ "3 tensors that are missing: a, b, c" """
    more = ", ..." if len(names) > NAMES_SHOWN else ""
    return f"{len(names):,} {text}: {', '.join(names[:NAMES_SHOWN])}{more}"
