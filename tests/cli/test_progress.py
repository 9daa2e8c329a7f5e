"""The bar, the time left and the lines of a log, by a clock of our own: no test depends on how fast a machine is."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from quantkit.convert.events import (
    CopyDone,
    Event,
    Finished,
    LayerDone,
    Report,
    StageStarted,
    Started,
    TensorDone,
    ValidationProgress,
)
from quantkit.convert.tally import Tally
from quantkit.errors import OutputError
from quantkit.evaluate.events import EvaluationStarted, LayerPassed
from quantkit.plan.schedule import COMPILING, FILES, KEPT, OUTSIDE, SCORES, VALIDATION, Cost, Schedule, Step
from quantkit.sensitivity.events import FisherLayer, FisherStarted
from quantkit.text.progress import LiveProgress, PlainProgress, ProgressDisplay, state_line

LAYERS, DENSE, TENSORS = 61, 3, 768
REPORT = Report((), {}, 0, 0, None, False, None)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def v3_steps(attention: float, mlp: float, shared: float, experts: float, validation: float) -> Schedule:
    """DeepSeek V3's layers: three dense ones, then 58 with experts; seconds of each kind of step."""

    def steps() -> Iterator[Step]:
        yield Step(OUTSIDE, None, Cost(60.0))
        for layer in range(LAYERS):
            yield Step("attention", layer, Cost(attention))
            if layer < DENSE:
                yield Step("mlp", layer, Cost(mlp))
            else:
                yield Step("shared_experts", layer, Cost(shared))
                yield Step("experts", layer, Cost(experts))
            yield Step(KEPT, layer, Cost(5.0))
        yield Step(FILES, None, Cost(600.0))
        for layer in range(LAYERS):
            yield Step(VALIDATION, layer, Cost(validation if layer >= DENSE else validation / 5))
        yield Step(SCORES, None, Cost(200.0))

    return tuple(steps())


EXPECTED = v3_steps(attention=120, mlp=100, shared=30, experts=1700, validation=120)


@dataclass
class Watched:
    """A conversion that takes what ``real`` says, told to a tally that expects ``EXPECTED``."""

    real: Schedule
    clock: Clock = field(default_factory=Clock)
    batch: int = 1
    """Experts' tensors that come at once."""
    seen: list[tuple[float, float, float]] = field(default_factory=list)
    """(seconds since the start, fraction, ETA) after each event."""

    def run(self, expected: Schedule = EXPECTED, done: int = 0) -> None:
        tally = Tally(self.clock)
        start = self.clock.now

        def tell(event: Event) -> None:
            tally.add(event)
            assert tally.eta_s is not None
            self.seen.append((self.clock.now - start, tally.fraction, tally.eta_s))

        tell(Started(LAYERS, 10**12, 2**19, done, schedule=expected))
        for number, step in enumerate(self.real):
            if step.kind in (FILES, VALIDATION, SCORES) or not done or (step.layer or -1) >= done:
                self._step(step, tell)
                following = self.real[number + 1].layer if number + 1 < len(self.real) else None
                if step.kind == KEPT:
                    tell(CopyDone(1, 1))
                    tell(LayerDone(step.layer or 0, 1.0, 2**19))
                    assert following is None or following > (step.layer or 0)
        tell(Finished(REPORT))

    def _step(self, step: Step, tell: Callable[[Event], None]) -> None:
        if step.kind == VALIDATION:
            self.clock.now += step.seconds
            tell(ValidationProgress((step.layer or 0) + 1, LAYERS))
            return
        if step.kind != SCORES:
            tell(StageStarted(step.kind, step.layer, TENSORS if step.kind == "experts" else 0))
        for number in range(TENSORS if step.kind == "experts" else 0):
            self.clock.now += 0 if number % self.batch else step.seconds * self.batch / TENSORS
            tell(TensorDone("w", 0.1, 2 * 10**7))
        if step.kind != "experts":
            self.clock.now += step.seconds

    def worst_error(self) -> float:
        """Of the ETA, as a share of the whole, from a tenth of the run on."""
        whole = self.seen[-1][0]
        return max(abs(at + eta - whole) / whole for at, _, eta in self.seen if at >= whole / 10)


@pytest.mark.parametrize(
    "real",
    [
        EXPECTED,
        v3_steps(attention=360, mlp=300, shared=90, experts=5100, validation=360),
        v3_steps(attention=40, mlp=200, shared=30, experts=600, validation=60),
        v3_steps(attention=300, mlp=50, shared=10, experts=3400, validation=400),
    ],
    ids=["as expected", "three times slower", "faster, by kinds", "slower, by kinds"],
)
@pytest.mark.parametrize("batch", [1, 96])
def test_the_eta_is_right_from_a_tenth_on(real: Schedule, batch: int) -> None:
    watched = Watched(real, batch=batch)
    watched.run()
    assert watched.worst_error() < 0.2
    assert watched.seen[-1][1:] == (1.0, pytest.approx(0.0, abs=1e-6))


def test_the_eta_is_there_from_the_start() -> None:
    tally = Tally(Clock())
    tally.add(Started(LAYERS, 10**12, 2**19, schedule=EXPECTED))
    assert tally.eta_s == pytest.approx(sum(step.seconds for step in EXPECTED))
    assert state_line(tally) == "layer 0/61  0 %  ETA 32 h 16 min"


@pytest.mark.parametrize("done", [0, 1, DENSE, 30, LAYERS])
def test_the_bar_never_runs_backwards(done: int) -> None:
    watched = Watched(v3_steps(attention=40, mlp=200, shared=30, experts=600, validation=500))
    watched.run(done=done)
    fractions = [fraction for _, fraction, _ in watched.seen]
    assert fractions == sorted(fractions)
    assert (fractions[0] > 0) == (done > 0)
    assert fractions[-1] == 1.0


def test_time_passes_within_a_step() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.add(Started(LAYERS, 10**12, 2**19, schedule=EXPECTED))
    tally.add(StageStarted(OUTSIDE))
    before = tally.eta_s
    clock.now += 40
    assert before is not None
    assert tally.eta_s == pytest.approx(before - 40)
    clock.now += 1000  # a step that takes longer than it should ends no other
    assert tally.eta_s == pytest.approx(before - 60)


def test_an_evaluation_weighs_its_layers() -> None:
    clock = Clock()
    tally = Tally(clock)
    steps = tuple(Step("layer", layer, Cost(work)) for layer, work in enumerate((1.0, 9.0, 9.0)))
    tally.add(EvaluationStarted(1, 2, 64, 3, steps))
    assert tally.eta_s is None
    clock.now += 10
    tally.add(LayerPassed(1, 3))
    assert tally.eta_s == pytest.approx(180)
    assert state_line(tally) == "layer 1/3  5 %  ETA 3 min"


# ----------------------------------------------------------------------------------------------------------- displays


def test_a_log_has_a_line_every_five_minutes() -> None:
    clock, stream = Clock(), io.StringIO()
    log = PlainProgress(stream, clock)
    log(StageStarted(COMPILING))
    log(Started(LAYERS, 10**12, 2**19, schedule=EXPECTED))
    log(StageStarted("experts", 3, TENSORS))
    clock.now += 299
    assert log.beat() == pytest.approx(1.0)
    clock.now += 1
    assert log.beat() == pytest.approx(300.0)
    log(TensorDone("w", 0.1, 10**9))
    clock.now += 301
    log.beat()
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["compiling kernels", "61 layers, 1000.00 GB to read, 524,288 calibration tokens"]
    assert [line.partition("  ")[2].split()[:2] for line in lines[2:]] == [["experts", "0/768"], ["experts", "1/768"]]
    assert all("ETA" in line for line in lines[2:])


def test_the_heart_beats_in_a_thread_of_its_own() -> None:
    clock, stream = Clock(), io.StringIO()
    with PlainProgress(stream, clock) as log:
        clock.now += 10_000
        log(Started(2, 10, 5))
    assert stream.getvalue().count("2 layers") == 1


def test_a_file_gets_plain_lines_beside_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    path = tmp_path / "progress.log"
    path.write_text("of a run before\n")
    with ProgressDisplay(LiveProgress(), path) as display:
        for event in (Started(2, 10, 5), LayerDone(0, 1.0, 5), LayerDone(1, 1.0, 5)):
            display(event)
    lines = path.read_text().splitlines()
    assert lines[:2] == ["of a run before", "2 layers, 0.00 GB to read, 5 calibration tokens"]
    assert [line.split("  ")[0] for line in lines[2:]] == ["layer 1/2", "layer 2/2"]
    assert "2 layers" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), ProgressDisplay(PlainProgress(), tmp_path):
        pass


def fisher_steps(layers: int) -> Schedule:
    forward = [Step("forward", layer, Cost(10.0)) for layer in range(layers)]
    return (*forward, *(Step("backward", layer, Cost(30.0)) for layer in reversed(range(layers))))


def test_lines_of_a_fisher_pass() -> None:
    """Needs first, then each layer; a resumed pass begins where it was."""
    stream, clock = io.StringIO(), Clock()
    shown = PlainProgress(stream, clock)
    shown(FisherStarted(4, 2, 100, 2 * 10**9, 3 * 10**9, forward=3, warnings=("thin text",), schedule=fisher_steps(4)))
    for event in (FisherLayer("forward", 4, 4), FisherLayer("backward", 1, 4), FisherLayer("backward", 4, 4)):
        clock.now += 30 if event.direction == "backward" else 10
        shown(event)
    assert stream.getvalue().splitlines() == [
        "4 layers, 100 tokens in 2 rows: 2.0 GB of disk, 3.0 GB of memory, about 2 min; resuming after 3 layers "
        "forward, 0 backward",
        "note: thin text",
        "layer 4/4  forward  25 %  ETA 120 s",
        "layer 1/4  backward  44 %  ETA 90 s",
        "layer 4/4  backward  100 %  ETA 0 s",
    ]
