"""Events -> progress on stderr: a live line in a terminal or a notebook, one plain line a layer elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import TracebackType

from quantkit.convert.events import (
    CopyDone,
    Event,
    Finished,
    LayerDone,
    StageStarted,
    Started,
    TensorDone,
    ValidationProgress,
)
from quantkit.evaluate.events import EvaluationEvent, EvaluationStarted, LayerPassed
from quantkit.text.tables import duration


@dataclass(slots=True)
class Tally:
    """What has happened so far, and how fast. Speeds count from this process's start, so a resumed run does not
    flatter itself."""

    clock: Callable[[], float] = time.monotonic
    started: float = 0.0
    total_layers: int = 0
    layers_done: int = 0
    bytes_done: int = 0
    stage: str = ""
    layer: int | None = None
    tensors_done: int = 0
    tensors_total: int = 0
    tokens_per_s: float = 0.0
    layer_seconds: list[float] = field(default_factory=list[float])

    def add(self, event: Event) -> None:
        """Take one event into account."""
        match event:
            case Started():
                self.started = self.clock()
                self.total_layers, self.layers_done = event.total_layers, event.layers_done
            case StageStarted():
                self.stage, self.layer = event.stage, event.layer
                self.tensors_done, self.tensors_total = 0, event.total
            case TensorDone():
                self.bytes_done += event.nbytes
                self.tensors_done += 1
            case LayerDone():
                self.layers_done += 1
                self.stage, self.layer, self.tensors_done, self.tensors_total = "", None, 0, 0
                self.layer_seconds.append(event.seconds)
                self.tokens_per_s = event.tokens / event.seconds if event.seconds > 0 else 0.0
            case CopyDone():
                self.stage = "copied"
            case ValidationProgress():
                self.stage, self.layer = "validation", None
                self.tensors_done, self.tensors_total = event.layer, event.layers
            case Finished():
                self.stage = "finished"

    @property
    def gb_per_s(self) -> float:
        """Decoded source bytes finished per second, in GB."""
        elapsed = self.clock() - self.started
        return self.bytes_done / elapsed / 1e9 if elapsed > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last layer, from the mean of the layers so far; None before the first."""
        if not self.layer_seconds:
            return None
        return (self.total_layers - self.layers_done) * sum(self.layer_seconds) / len(self.layer_seconds)

    def line(self) -> str:
        """The state in one line."""
        parts = [f"layer {self.layers_done}/{self.total_layers}"]
        if self.stage:
            count = f" {self.tensors_done}/{self.tensors_total}" if self.tensors_total else ""
            parts.append(f"{self.stage}{count}")
        if self.tokens_per_s:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        parts.append(f"{self.gb_per_s:.2f} GB/s" if self.gb_per_s >= 0.1 else f"{self.gb_per_s * 1e3:.1f} MB/s")
        if self.eta_s is not None:
            parts.append(f"ETA {duration(self.eta_s)}")
        return "  ".join(parts)


def progress() -> PlainProgress | LiveProgress:
    """Progress of a conversion or an evaluation, for ``on_event``::

        with quantkit.progress() as on_event:
            quantkit.convert(source, recipe, out, on_event=on_event)

    Drawn live in a terminal, and in a notebook that has ipywidgets; elsewhere lines for a log.
    """
    # rich draws into a notebook by ipywidgets, and only warns where they are missing.
    notebook = "ipykernel" in sys.modules
    live = find_spec("ipywidgets") is not None if notebook else sys.stderr.isatty()
    return LiveProgress() if live else PlainProgress()


@contextmanager
def reading() -> Generator[Callable[[int, int], object]]:
    """Progress of reading files, for ``on_read``: (bytes done, bytes of all). Nothing outside a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("reading", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class PlainProgress:
    """Lines for a log: the start, each layer, each fifth of the validation."""

    def __init__(self) -> None:
        self._tally = Tally()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event | EvaluationEvent) -> None:
        """Take an event, print a line if it is worth one."""
        line = self._line(event)
        if line:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _line(self, event: Event | EvaluationEvent) -> str:
        if not isinstance(event, EvaluationStarted | LayerPassed):
            self._tally.add(event)
        match event:
            case Started() | EvaluationStarted():
                return _start_line(event)
            case LayerDone():
                return f"{self._tally.line()}  ({event.seconds:.1f} s)"
            case ValidationProgress() if _fifth(event):
                return f"validation: layer {event.layer}/{event.layers}"
            case LayerPassed() if _fifth(event):
                return f"layer {event.layer}/{event.layers}"
            case _:
                return ""


class LiveProgress:
    """One line that is redrawn, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._tally = Tally()
        columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("planning", total=None)

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event | EvaluationEvent) -> None:
        """Take an event and redraw."""
        if isinstance(event, Started | EvaluationStarted):
            self._progress.console.print(_start_line(event), highlight=False)
        match event:
            case EvaluationStarted():
                self._draw(0, event.layers, f"layer 0/{event.layers}")
            case LayerPassed():
                self._draw(event.layer, event.layers, f"layer {event.layer}/{event.layers}")
            case ValidationProgress():
                self._tally.add(event)
                self._draw(event.layer, event.layers, self._tally.line())
            case _:
                tally = self._tally
                tally.add(event)
                within = min(1.0, tally.tensors_done / tally.tensors_total) if tally.tensors_total else 0.0
                done = tally.layers_done + within * (tally.layer is not None)
                self._draw(done, tally.total_layers or None, tally.line())

    def _draw(self, done: float, total: float | None, line: str) -> None:
        self._progress.update(self._task, total=total, completed=done, description=line)


def _fifth(event: ValidationProgress | LayerPassed) -> bool:
    """Whether another fifth of the layers has passed."""
    return event.layer == event.layers or event.layer % max(1, event.layers // 5) == 0


def _start_line(event: Started | EvaluationStarted) -> str:
    if isinstance(event, EvaluationStarted):
        candidates = "1 candidate" if event.candidates == 1 else f"{event.candidates} candidates"
        return f"{candidates}, {event.windows:,} windows, {event.tokens:,} tokens"
    calibration = f"{event.tokens:,} calibration tokens" if event.tokens else "no calibration"
    resumed = f", resuming after layer {event.layers_done}" if event.layers_done else ""
    line = f"{event.total_layers} layers, {event.total_bytes / 1e9:.2f} GB to read, {calibration}{resumed}"
    return "\n".join([line, *(f"note: {warning}" for warning in event.warnings)])
