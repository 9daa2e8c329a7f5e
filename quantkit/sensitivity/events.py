"""Events of a running Fisher pass, for progress displays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from quantkit.plan.schedule import Schedule

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class FisherStarted:
    """Everything is checked and work begins. ``disk``, ``memory``: bytes that it takes at most; ``forward``,
    ``backward``: layers that an earlier, killed run has passed; ``schedule``: a step for each layer forward, then one
    for each backward; ``warnings``: what makes the text doubtful."""

    layers: int
    rows: int
    tokens: int
    disk: int
    memory: int
    forward: int = 0
    backward: int = 0
    warnings: tuple[str, ...] = ()
    schedule: Schedule = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class FisherLayer:
    """``done`` of ``layers`` were passed in this direction, and that is on the disk."""

    direction: Direction
    done: int
    layers: int


FisherEvent = FisherStarted | FisherLayer
OnFisher = Callable[[FisherEvent], None]
