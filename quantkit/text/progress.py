"""Events -> progress: a live line in a terminal or a notebook, lines for a log elsewhere, and into a file if wanted."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TextIO

from quantkit.convert.events import Event, ExpertsScored, LayerDone, StageStarted, Started, ValidationProgress
from quantkit.convert.tally import Tally
from quantkit.errors import OutputError
from quantkit.evaluate.events import EvaluationEvent, EvaluationStarted, LayerPassed
from quantkit.formats.sizes import short_size
from quantkit.plan.schedule import COMPILING
from quantkit.sensitivity.events import FisherEvent, FisherLayer, FisherStarted, LossesLayer
from quantkit.text.tables import counted, duration, rough

HEARTBEAT_S = 300.0
"""A log has a line at least so often."""
AnyEvent = Event | EvaluationEvent | FisherEvent
Beginning = Started | EvaluationStarted | FisherStarted


def progress(log: Path | str | None = None) -> ProgressDisplay:
    """Progress of a conversion, an evaluation or a Fisher pass, for ``on_event``::

        with quantkit.progress() as on_event:
            quantkit.convert(source, recipe, out, on_event=on_event)

    Drawn live in a terminal, and in a notebook that has ipywidgets; elsewhere lines for a log, one at least every five
    minutes. ``log``: a file that gets these lines too, after what it holds. Raises `OutputError` if it cannot be
    written.
    """
    # rich draws into a notebook by ipywidgets, and only warns where they are missing.
    notebook = "ipykernel" in sys.modules
    live = find_spec("ipywidgets") is not None if notebook else sys.stderr.isatty()
    return ProgressDisplay(LiveProgress() if live else PlainProgress(), None if log is None else Path(log))


@contextmanager
def reading() -> Generator[Callable[[int, int], object]]:
    """Progress of reading files, for ``on_read``: (bytes done, bytes of all). Nothing outside a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("reading", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class ProgressDisplay:
    """A display, and a log file beside it."""

    def __init__(self, shown: PlainProgress | LiveProgress, log: Path | None = None) -> None:
        self._shown: list[PlainProgress | LiveProgress] = [shown]
        self._stack = ExitStack()
        self._log = log

    def __enter__(self) -> ProgressDisplay:
        if self._log is not None:
            self._shown.append(PlainProgress(self._stack.enter_context(_opened(self._log))))
        for one in self._shown:
            self._stack.enter_context(one)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, event: AnyEvent) -> None:
        """Take an event."""
        for one in self._shown:
            one(event)


def _opened(log: Path) -> TextIO:
    try:
        return log.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{log}: cannot be written: {error.strerror or error}.") from None


class PlainProgress:
    """Lines for a log: the start, what is compiled, each layer, each fifth of the validation, and the state when
    nothing was said for five minutes. ``stream``: default, stderr as it is when a line is written."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._tally = Tally(clock)
        self._said = clock()
        # Events come from the thread that writes beside a GPU too, heartbeats from one of their own.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat_until_ended, name="progress", daemon=True)

    def __enter__(self) -> PlainProgress:
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._pulse.join()

    def __call__(self, event: AnyEvent) -> None:
        """Take an event, write a line if it is worth one."""
        with self._lock:
            line = self._line(event)
            if line:
                self._say(line)

    def beat(self) -> float:
        """Write the state if nothing was said for `HEARTBEAT_S` -> seconds until that is so again."""
        with self._lock:
            if self._clock() - self._said >= HEARTBEAT_S:
                self._say(state_line(self._tally))
            return HEARTBEAT_S - (self._clock() - self._said)

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(max(0.0, self.beat())):
            pass

    def _say(self, line: str) -> None:
        self._said = self._clock()
        stream = sys.stderr if self._stream is None else self._stream
        stream.write(f"{line}\n")
        stream.flush()

    def _line(self, event: AnyEvent) -> str:
        self._tally.add(event)
        match event:
            case Started() | EvaluationStarted() | FisherStarted():
                return start_line(event)
            case StageStarted() if event.stage == COMPILING:
                return COMPILING
            case LayerDone():
                return f"{state_line(self._tally)}  ({duration(event.seconds)})"
            case ValidationProgress() if _fifth(event):
                return state_line(self._tally)
            case LayerPassed() if _fifth(event):
                return state_line(self._tally)
            case FisherLayer() | LossesLayer() | ExpertsScored():
                return state_line(self._tally)
            case _:
                return ""


class LiveProgress:
    """One line that is redrawn, by rich. The time left runs on between two events."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, RenderableColumn, SpinnerColumn, TimeElapsedColumn

        self._tally = Tally()
        # The thread that draws reads what the one that works writes.
        self._lock = threading.Lock()
        line = RenderableColumn(_Line(self._text))
        columns = (SpinnerColumn(), BarColumn(bar_width=24), line, TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: AnyEvent) -> None:
        """Take an event and redraw."""
        if isinstance(event, Beginning):
            self._progress.console.print(start_line(event), highlight=False)
        with self._lock:
            self._tally.add(event)
            total, done = (None if self._tally.pace is None else 1.0), self._tally.fraction
        self._progress.update(self._task, total=total, completed=done)

    def _text(self) -> str:
        with self._lock:
            return state_line(self._tally)


@dataclass(frozen=True, slots=True)
class _Line:
    """What rich asks for its text whenever it draws."""

    text: Callable[[], str]

    def __rich__(self) -> str:
        return self.text() or "planning"


def _fifth(event: ValidationProgress | LayerPassed) -> bool:
    """Whether another fifth of the layers has passed."""
    return event.layer == event.layers or event.layer % max(1, event.layers // 5) == 0


def start_line(event: Beginning) -> str:
    """What begins, and how long it should take if that was measured."""
    if isinstance(event, FisherStarted):
        return _fisher_line(event)
    if isinstance(event, EvaluationStarted):
        return f"{counted(event.candidates, 'candidate')}, {counted(event.windows, 'window')}, {event.tokens:,} tokens"
    calibration = f"{event.tokens:,} calibration tokens" if event.tokens else "no calibration"
    resumed = f", resuming after layer {event.layers_done}" if event.layers_done else ""
    line = f"{counted(event.total_layers, 'layer')}, {event.total_bytes / 1e9:.2f} GB to read, {calibration}{resumed}"
    return "\n".join([line, *(f"note: {warning}" for warning in event.warnings)])


def _fisher_line(event: FisherStarted) -> str:
    """What a Fisher pass needs, and where it goes on."""
    done = f"{event.forward} layers forward, {event.backward} backward"
    resumed = f"; resuming after {done}" if event.forward else ""
    seconds = sum(step.seconds for step in event.schedule[event.forward + event.backward :])
    line = (
        f"{counted(event.layers, 'layer')}, {event.tokens:,} tokens in {counted(event.rows, 'row')}: "
        f"{short_size(event.disk)} of disk, {short_size(event.memory)} of memory, about {rough(seconds)}{resumed}"
    )
    return "\n".join([line, *(f"note: {warning}" for warning in event.warnings)])


def state_line(tally: Tally) -> str:
    """The state in one line."""
    parts = [f"layer {tally.layers_done}/{tally.total_layers}"] if tally.total_layers else []
    if tally.stage:
        count = f" {tally.tensors_done}/{tally.tensors_total}" if tally.tensors_total else ""
        parts.append(f"{tally.stage}{count}")
    if tally.pace is not None:
        parts.append(f"{100 * tally.fraction:.0f} %")
    if tally.loss:
        parts.append(f"loss {tally.loss}")
    if tally.tokens_per_s:
        parts.append(f"{tally.tokens_per_s:,.0f} tokens/s")
    if tally.bytes_done:
        parts.append(f"{tally.gb_per_s:.2f} GB/s" if tally.gb_per_s >= 0.1 else f"{tally.gb_per_s * 1e3:.1f} MB/s")
    if tally.eta_s is not None:
        parts.append(f"ETA {duration(tally.eta_s)}")
    return "  ".join(parts)
