"""GPUs that a checkpoint is to be served on, and how layers are spread over them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkit.arch.base import ServingSizes
from quantkit.errors import PlanError
from quantkit.formats.planned import PlannedTensor

GIB = 2**30
KNOWN_GPUS_GIB = {"A100-40GB": 39.4, "A100-80GB": 79.2, "H100-80GB": 79.1, "H200-141GB": 139.8, "B200-180GB": 178.3}
"""Memory that CUDA reports. Others count as 98 % of the GiB in their name."""
CAPABILITIES = {
    **dict.fromkeys(("V100",), 7.0),
    **dict.fromkeys(("T4", "RTX8000"), 7.5),
    **dict.fromkeys(("A100", "A800", "A30"), 8.0),
    **dict.fromkeys(("A40", "A10", "A10G", "A16", "A6000", "RTXA6000", "A5000", "RTX3090"), 8.6),
    **dict.fromkeys(("L40", "L40S", "L4", "L20", "RTX4090", "RTX6000ADA"), 8.9),
    "H100": 9.0,
}
"""Compute capability, by the name without its size. A name that is not here is taken to be newer than all of these."""


class SizedOutput(Protocol):
    """A planned checkpoint."""

    @property
    def planned(self) -> Sequence[PlannedTensor]:
        """The planned tensors, in official order, each with the family's spec."""
        ...

    def stored_bytes(self, tensor: PlannedTensor) -> int:
        """Exact bytes of one of them, scales and shapes included."""
        ...


@dataclass(frozen=True, slots=True)
class Gpus:
    """``count`` GPUs of ``total_bytes`` usable memory each."""

    count: int
    name: str
    total_bytes: int

    @property
    def capability(self) -> float | None:
        """CUDA's compute capability, None if it is not known here."""
        return CAPABILITIES.get(self.name.partition("-")[0].upper())

    def __str__(self) -> str:
        return f"{self.count}x{self.name}"


def parse_gpus(text: str) -> Gpus:
    """ "5xA100-80GB" -> `Gpus`; a model that comes in one size only needs none ("8xH100"). Raises `ValueError` with
    what was found and needed."""
    found = re.fullmatch(r"([1-9]\d{0,2})x([A-Za-z][A-Za-z0-9]*)(?:-([1-9]\d{0,3})GB)?", text.strip(), re.ASCII)
    sizes = [] if not found or found[3] else [n for n in KNOWN_GPUS_GIB if n.startswith(f"{found[2].upper()}-")]
    if not found or not (found[3] or len(sizes) == 1):
        needed = " or ".join(f"{found[1]}x{name}" for name in sizes) if found and sizes else ""
        raise ValueError(f"found {text[:40]!r}, needed {needed or 'COUNTxNAME-SIZEGB such as 5xA100-80GB'}")
    name = sizes[0] if sizes else f"{found[2]}-{found[3]}GB"
    gib = KNOWN_GPUS_GIB.get(name.upper()) or 0.98 * int(found[3])
    return Gpus(int(found[1]), name, round(gib * GIB))


def check_context(sizes: ServingSizes, context: int) -> None:
    """Raise `PlanError` if the model is not made for ``context`` tokens."""
    if context > sizes.max_positions:
        raise PlanError(
            f"--context {context:,}: the model is made for at most {sizes.max_positions:,} tokens.",
            hint=f"Give --context {sizes.max_positions} or less.",
        )


def partition_layers(costs: list[int], first: int, last: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage so that the fullest stage is as small as can be, and the others even.

    Dynamic programming over (stages used, layers placed); a solution's cost is (fullest stage, sum of squares).
    """
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)
    n_layers = len(costs)

    def stage_cost(stage: int, start: int, stop: int) -> int:
        return before[stop] - before[start] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(stages):
        following: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (fullest, squares, sizes) in best.items():
            for stop in range(start + 1, n_layers - (stages - 1 - stage) + 1):
                cost = stage_cost(stage, start, stop)
                candidate = (max(fullest, cost), squares + cost**2, (*sizes, stop - start))
                if stop not in following or candidate < following[stop]:
                    following[stop] = candidate
        best = following
    return best[n_layers][2]
