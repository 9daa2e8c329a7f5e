"""A conversion as steps in the order of the work, each with the seconds that it should take: the plan's hours are their
sum, the progress bar is how far along them a running conversion is.

Steps carry the names of the events that begin them (`quantkit.convert.events`). No torch is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from quantkit.arch.base import ModelArch

OUTSIDE, KEPT, FILES, VALIDATION, SCORES = "embeddings", "kept", "files", "validation", "scores"
READING = 250
"""A weight is read and decoded in the time in which so many tokens are multiplied with it."""
AFTER_LAYERS = (FILES, VALIDATION, SCORES)
COMPILING, PASSING, LAYER, MTP_INPUTS = "compiling kernels", "passing", "layer", "mtp inputs"
TUNING = "tuning"
SCORING = "scoring experts"
"""Before the steps of a schedule: how long it takes is not part of it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of ``computing`` and ``writing``, of ``reading`` before, and of reading ``ahead`` while something is
    computed."""

    computing: float = 0.0
    writing: float = 0.0
    reading: float = 0.0
    ahead: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.computing + other.computing,
            self.writing + other.writing,
            self.reading + other.reading,
            self.ahead + other.ahead,
        )

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.reading + max(self.ahead, self.computing) + self.writing


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the work. ``kind``: the stage that begins it ("attention", "experts", "validation"...); ``layer``: None
    outside the layers."""

    kind: str
    layer: int | None
    cost: Cost

    @property
    def seconds(self) -> float:
        """How long it should take."""
        return self.cost.seconds


Schedule = tuple[Step, ...]


def even(n_layers: int) -> Schedule:
    """Layers of which nothing is known."""
    return weighted([1.0] * n_layers)


def weighted(work: Sequence[float]) -> Schedule:
    """A step for each layer, in any unit: how long one takes is seen when the first is done."""
    return tuple(Step(LAYER, layer, Cost(each)) for layer, each in enumerate(work))


def layer_work(arch: ModelArch, tokens: int) -> list[float]:
    """Work of each layer for so many tokens that only pass: the weights times the tokens that meet them, and reading
    them, which counts as `READING` tokens."""
    work = [0.0] * arch.n_layers
    count = 1 + max((spec.expert for spec in arch.tensors() if spec.expert is not None), default=0)
    routed = tokens * arch.serving().top_k / count
    for spec in arch.tensors():
        if spec.linear and spec.layer is not None and spec.layer < arch.n_layers:
            work[spec.layer] += prod(spec.shape) * (READING + (tokens if spec.expert is None else routed))
    return work


@dataclass(frozen=True, slots=True)
class Duration:
    """``steps`` in the order of the work. ``device``: cpu, or the GPU's model; ``threads`` of the processor."""

    device: str
    threads: int
    steps: Schedule

    @property
    def seconds(self) -> float:
        """Of the whole."""
        return sum(step.seconds for step in self.steps)

    @property
    def cost(self) -> Cost:
        """Reading, computing and writing of the whole."""
        return sum((step.cost for step in self.steps), Cost())

    @property
    def after_layers(self) -> float:
        """Seconds of checksums and validation."""
        return sum(step.seconds for step in self.steps if step.kind in AFTER_LAYERS)
