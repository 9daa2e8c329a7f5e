"""What `verify` found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUNTIMES = ("vllm", "transformers", "sglang", "llama.cpp")
"""Whose load contracts are known."""
ANY = ""
"""For a `Finding` that no runtime gets around."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``runtime``: of `RUNTIMES`, or `ANY`. ``fault``: the checkpoint does not load there, or is computed wrongly;
    else it loads, but somewhat otherwise than expected."""

    runtime: str
    fault: bool
    text: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What was read beyond headers. ``hashed_bytes`` in ``hashed`` files agreed with quantkit.json's sha256;
    ``decoded``: linears of which every value was decoded; ``compared``: those of them that were compared with the
    original; ``not_decoded``: linears were to be, and were not because of faults."""

    hashed: int = 0
    hashed_bytes: int = 0
    decoded: int = 0
    compared: int = 0
    not_decoded: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Verification:
    """``stored_as``: what config.json, or the file, says of the weights; ``tensors``: how many were held against the
    family's list, None where the file could not be read."""

    path: Path
    stored_as: str
    runtimes: tuple[str, ...]
    tensors: int | None
    findings: tuple[Finding, ...]
    contents: Contents = Contents()

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What keeps the checkpoint from being used."""
        return tuple(finding for finding in self.findings if finding.fault)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What else is to be known."""
        return tuple(finding for finding in self.findings if not finding.fault)

    @property
    def passed(self) -> bool:
        """Whether there are no faults."""
        return not self.faults

    @property
    def held(self) -> str:
        """What is stored, in words."""
        return self.stored_as if self.tensors is None else f"{self.stored_as}, {self.tensors:,} tensors"

    def __repr__(self) -> str:
        what = f"{self.held}, for {', '.join(self.runtimes)}"
        return f"<Verification {self.path}: {what}; {len(self.faults)} faults, {len(self.notes)} notes>"
