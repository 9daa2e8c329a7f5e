"""Events of a running evaluation, for progress displays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from quantkit.plan.schedule import Schedule


@dataclass(frozen=True, slots=True)
class EvaluationStarted:
    """All models of an evaluation are open. ``candidates`` without the noise floor; ``schedule``: how long the layers
    take beside one another."""

    candidates: int
    windows: int
    tokens: int
    layers: int
    schedule: Schedule = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class LayerPassed:
    """Every model of an evaluation has passed ``layer`` (from 1) of ``layers``."""

    layer: int
    layers: int


EvaluationEvent = EvaluationStarted | LayerPassed
OnEvaluation = Callable[[EvaluationEvent], None]


def ignore(event: EvaluationEvent) -> None:
    """Do nothing with an event."""
