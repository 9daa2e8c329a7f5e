"""Events -> how far a conversion, an evaluation or a Fisher pass is, and when it will be done.

The schedule says how long each step should take. What the steps so far really took corrects that, each kind of work by
itself: if attention took twice as long as expected, attention that is left does too, and so does what has not begun, by
the mean of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from quantkit.convert.events import (
    CopyDone,
    Event,
    ExpertsScored,
    Finished,
    LayerDone,
    LayerTuned,
    StageStarted,
    Started,
    TensorDone,
    TuningStep,
    ValidationProgress,
)
from quantkit.evaluate.events import EvaluationEvent, EvaluationStarted, LayerPassed
from quantkit.plan.schedule import AFTER_LAYERS, LAYER, SCORING, TUNING, VALIDATION, Schedule, Step, even
from quantkit.sensitivity.events import FisherEvent, FisherLayer, FisherStarted, LossesLayer

MANY = 16
"""Tensors of a block of experts at least."""
PRIOR_SHARE = 0.01
"""The schedule counts as much as this share of the whole that has been measured."""


@dataclass(slots=True)
class Pace:
    """Where on the schedule the work is, in expected seconds, and what each kind of work really took. The place never
    moves back."""

    steps: Schedule
    now: float
    place: float = 0.0
    current: int = 0
    """The step that is running."""
    seen: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Expected and real seconds of what was done here, by kind."""
    burst: list[tuple[str, float, float]] = field(default_factory=list[tuple[str, float, float]])
    """Kind, expected and real seconds of results that came one upon the other, and what they came after."""
    waited: float = 0.0
    starts: tuple[float, ...] = ()
    left: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        """Add up."""
        starts = [0.0]
        for step in self.steps:
            starts.append(starts[-1] + step.seconds)
            self.left[step.kind] = self.left.get(step.kind, 0.0) + step.seconds
        self.starts = tuple(starts)

    @property
    def total(self) -> float:
        """Expected seconds of all steps."""
        return self.starts[-1]

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return self.place / self.total if self.total else 0.0

    def find(self, matches: Callable[[Step], bool]) -> int | None:
        """The first step from the current one on that matches."""
        return next((n for n in range(self.current, len(self.steps)) if matches(self.steps[n])), None)

    def skip(self, step: int) -> None:
        """Go to the beginning of a step that an earlier process reached."""
        self._move(step, self.starts[step])

    def advance(self, step: int, share: float, now: float) -> None:
        """``share`` of a step is done, and all before it. What passed since the last advance is what that took."""
        goal = self.starts[step] + min(1.0, share) * self.steps[step].seconds if step < len(self.steps) else self.total
        if goal <= self.place:
            self.current = max(self.current, step)
            return
        took, whole = now - self.now, goal - self.place
        # Results of a batch come at once: what the first of them took is what all took.
        if step != self.current or took > self.waited / 2:
            self._learn()
        self.waited = max(self.waited, took)
        for kind, expected in self._move(step, goal):
            self.burst.append((kind, expected, took * expected / whole))
        if not 0 < share < 1:  # a step is over
            self._learn()
        self.now = now

    def _learn(self) -> None:
        """The burst is over."""
        for kind, expected, took in self.burst:
            before = self.seen.get(kind, (0.0, 0.0))
            self.seen[kind] = (before[0] + expected, before[1] + took)
        self.burst.clear()
        self.waited = 0.0

    def _move(self, step: int, goal: float) -> list[tuple[str, float]]:
        """Change the place -> kinds of work passed, and how much of each."""
        passed: list[tuple[str, float]] = []
        for number in range(self.current, min(step + 1, len(self.steps))):
            kind = self.steps[number].kind
            part = min(goal, self.starts[number + 1]) - max(self.place, self.starts[number])
            if part > 0:
                passed.append((kind, part))
                self.left[kind] -= part
        self.current, self.place = max(self.current, step), max(self.place, goal)
        return passed

    def expected(self, kind: str, seconds: float) -> float:
        """``seconds`` of the schedule as they will really be, by what was seen of this kind and of all."""
        prior = max((1e-6 if self.relative else PRIOR_SHARE) * self.total, 1e-9)
        expected, real = (sum(pair[side] for pair in self.seen.values()) for side in (0, 1))
        known, took = self.seen.get(kind, (0.0, 0.0))
        return seconds * (took + prior * (real + prior) / (expected + prior)) / (known + prior)

    @property
    def relative(self) -> bool:
        """Whether the schedule says only how much longer one layer takes than another."""
        return all(step.kind == LAYER for step in self.steps)

    def remaining(self, now: float) -> float | None:
        """Seconds until all is done; None while that cannot be known."""
        if self.relative and not self.seen:
            return None
        idle = 0.0
        if self.current < len(self.steps):  # time passes within a step, too
            running = self.expected(self.steps[self.current].kind, self.starts[self.current + 1] - self.place)
            idle = min(now - self.now, running)
        return max(0.0, sum(self.expected(kind, left) for kind, left in self.left.items()) - idle)


@dataclass(slots=True)
class Tally:
    """What has happened so far, and how fast. Speeds count from this process's start, so a resumed run does not
    flatter itself."""

    clock: Callable[[], float] = time.monotonic
    started: float = 0.0
    pace: Pace | None = None
    total_layers: int = 0
    layers_done: int = 0
    bytes_done: int = 0
    stage: str = ""
    tensors_done: int = 0
    tensors_total: int = 0
    tokens_per_s: float = 0.0
    loss: str = ""
    """Of the layer that was tuned last, before and after."""

    def add(self, event: Event | EvaluationEvent | FisherEvent) -> None:
        """Take one event into account."""
        match event:
            case Started():
                self._start(event.total_layers, event.schedule)
                self._resume(event.layers_done)
            case EvaluationStarted():
                self._start(event.layers, event.schedule)
                self.stage = ""
            case StageStarted():
                self.stage, self.tensors_done, self.tensors_total = event.stage, 0, event.total
                self._reach(lambda step: (step.kind, step.layer) == (event.stage, event.layer), 0.0)
            case TensorDone():
                self.bytes_done += event.nbytes
                self.tensors_done += 1
                self._within()
            case TuningStep():
                self.tensors_done, self.tensors_total = event.done, event.total
                self._reach(lambda step: (step.kind, step.layer) == (TUNING, event.layer), event.done / event.total)
            case LayerTuned():
                self.loss = f"{event.before:.4g} -> {event.after:.4g}"
            case LayerDone():
                self._layer_done(event)
            case CopyDone():
                self.stage = "copied"
            case ValidationProgress():
                self.stage, self.tensors_done, self.tensors_total = VALIDATION, event.layer, event.layers
                self._reach(lambda step: (step.kind, step.layer) == (VALIDATION, event.layer - 1), 1.0)
            case LayerPassed():
                self.layers_done = event.layer
                self._reach(lambda step: step.layer == event.layer - 1, 1.0)
            case FisherStarted():
                self._start(event.layers, event.schedule)
                if self.pace is not None:
                    self.pace.skip(event.forward + event.backward)
            case FisherLayer():
                self.layers_done, self.stage = event.done, event.direction
                layer = event.done - 1 if event.direction == "forward" else event.layers - event.done
                self._reach(lambda step: (step.kind, step.layer) == (event.direction, layer), 1.0)
            case LossesLayer():
                if event.done == 0:
                    self._start(event.layers, ())
                self.layers_done, self.stage = event.done, "losses of types"
                self._reach(lambda step: step.layer == event.done - 1, 1.0)
            case ExpertsScored():
                if event.done == 0:
                    self._start(event.layers, ())
                self.layers_done, self.stage = event.done, SCORING
                self._reach(lambda step: step.layer == event.done - 1, 1.0)
            case Finished():
                self.stage = "finished"
                if self.pace is not None:
                    self.pace.advance(len(self.pace.steps), 0.0, self.clock())

    def _start(self, layers: int, schedule: Schedule) -> None:
        self.started = self.clock()
        self.total_layers, self.layers_done = layers, 0
        self.pace = Pace(schedule or even(layers), self.started)

    def _resume(self, layers: int) -> None:
        """An earlier process has finished so many layers, in order."""
        self.layers_done = layers
        if self.pace is None or not layers:
            return
        done = sorted({step.layer for step in self.pace.steps if step.layer is not None})[:layers]
        first = self.pace.find(lambda step: step.kind in AFTER_LAYERS or (step.layer or 0) > done[-1])
        self.pace.skip(len(self.pace.steps) if first is None else first)

    def _reach(self, matches: Callable[[Step], bool], share: float) -> None:
        step = None if self.pace is None else self.pace.find(matches)
        if self.pace is not None and step is not None:
            self.pace.advance(step, share, self.clock())

    def _within(self) -> None:
        """Another tensor of the step that is running, if it has many: the few of an attention are not alike."""
        if self.pace is not None and self.tensors_total >= MANY and self.pace.current < len(self.pace.steps):
            self.pace.advance(self.pace.current, self.tensors_done / self.tensors_total, self.clock())

    def _layer_done(self, event: LayerDone) -> None:
        self.layers_done += 1
        self.stage, self.tensors_done, self.tensors_total = "", 0, 0
        self.tokens_per_s = event.tokens / event.seconds if event.seconds > 0 else 0.0
        if self.pace is None:
            return
        after = self.pace.find(lambda step: step.kind in AFTER_LAYERS or (step.layer or 0) > event.layer)
        self.pace.advance(len(self.pace.steps) if after is None else after, 0.0, self.clock())

    @property
    def gb_per_s(self) -> float:
        """Decoded source bytes finished per second, in GB."""
        elapsed = self.clock() - self.started
        return self.bytes_done / elapsed / 1e9 if elapsed > 0 else 0.0

    @property
    def fraction(self) -> float:
        """How far the whole is, from 0 to 1; it never falls."""
        return 0.0 if self.pace is None else self.pace.fraction

    @property
    def eta_s(self) -> float | None:
        """Seconds until all is done, validation included; None while that cannot be known."""
        return None if self.pace is None else self.pace.remaining(self.clock())
