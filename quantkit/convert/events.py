"""What a running conversion tells whoever watches it, and the report that it leaves.

Events are plain values: the command line draws them as progress, a test collects them in a list. They carry no
behaviour, and the conversion never waits for their reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.documents.conversion import PoorFit, ValidationResult
from quantkit.plan.schedule import Schedule
from quantkit.sensitivity.events import LossesLayer


@dataclass(frozen=True, slots=True)
class Started:
    """The plan is made and work begins. ``total_bytes``: stored source bytes to be read; ``tokens``: calibration
    tokens (0: data-free); ``layers_done``: layers that an earlier, killed run has finished already; ``warnings``: what
    the outputs will lack, and what makes the calibration text doubtful; ``schedule``: how long each step should take,
    () if that is not known."""

    total_layers: int
    total_bytes: int
    tokens: int
    layers_done: int = 0
    warnings: tuple[str, ...] = ()
    schedule: Schedule = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A part of the work begins: "compiling kernels", "embeddings", "attention", "experts", "validation"... ``layer``
    is None outside the decoder layers; ``total`` says how many tensors the stage will report (0: unknown)."""

    stage: str
    layer: int | None = None
    total: int = 0


@dataclass(frozen=True, slots=True)
class ExpertsScored:
    """The text has passed ``done`` of ``layers`` to score the experts (0: it begins). Comes before `Started`."""

    done: int
    layers: int


@dataclass(frozen=True, slots=True)
class TensorDone:
    """A linear is quantised and written for the first output. ``error``: its relative loss; ``nbytes``: of the decoded
    source tensor."""

    name: str
    error: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class TuningStep:
    """``done`` of ``total`` updates of a layer's codes, scales and norms."""

    layer: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class LayerTuned:
    """A layer is tuned. ``before``, ``after``: squared error of its output on held-out calibration rows, relative to
    what it adds; ``epoch``: whose state is kept, 0: nothing was better than what the methods gave."""

    layer: int
    before: float
    after: float
    epoch: int


@dataclass(frozen=True, slots=True)
class LayerDone:
    """All tensors of a layer are on disk and the journal says so. ``tokens`` advanced through it in ``seconds``."""

    layer: int
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class CopyDone:
    """Tensors kept as they are (embeddings, head, MTP) are written."""

    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ValidationProgress:
    """Reference and result have passed ``layer`` of ``layers`` side by side."""

    layer: int
    layers: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The output stands under its final name."""

    report: Report


@dataclass(frozen=True, slots=True)
class ExpertTokenStats:
    """Calibration tokens over all routed experts of all layers. ``thin``: experts that borrowed tokens, because
    fewer chose them than the recipe's ``min_expert_tokens``."""

    experts: int
    least: int
    median: int
    most: int
    unseen: int
    thin: int


@dataclass(frozen=True, slots=True)
class OutputReport:
    """One finished checkpoint. ``nbytes``: tensor data; ``bpw``: stored bits per weight of the whole checkpoint;
    ``serve``: shell lines that serve it; ``faults``: what `quantkit.verify` finds in headers and config, nothing unless
    something went wrong; ``poor_fits``: linears that lose far more than their scheme should;
    ``repacked``: those with the codes of the source."""

    name: str
    path: Path
    nbytes: int
    bpw: float
    tensors: int
    quantized: int
    fallbacks: int
    validation: ValidationResult | None = None
    serve: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    poor_fits: tuple[PoorFit, ...] = ()
    repacked: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What a conversion did. ``seconds`` by stage, in the order of the work; ``validated``: every output keeps
    the recipe's limits, None if there are none. ``peak_gpu_bytes``: the most that torch had allocated on the GPU, None
    without one. ``finished_before``: an earlier process did all of it, and was stopped while it tidied up."""

    outputs: tuple[OutputReport, ...]
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    tokens: int
    expert_tokens: ExpertTokenStats | None
    resumed: bool
    validated: bool | None
    peak_gpu_bytes: int | None = None
    finished_before: bool = False

    @property
    def total_seconds(self) -> float:
        """Wall seconds of the whole run (of this process, when resumed)."""
        return sum(self.seconds.values())

    def __repr__(self) -> str:
        """The outputs in one line."""
        outputs = "; ".join(map(_outline, self.outputs))
        return f"<Report {outputs}; {self.total_seconds:.0f} s{'; NOT VALIDATED' if self.validated is False else ''}>"


def _outline(output: OutputReport) -> str:
    text = f"{output.name}: {output.nbytes:,} bytes, {output.bpw:.3f} bpw"
    if output.validation is None:
        return text
    scores = output.validation.scores
    ratio, kl = scores.perplexity_ratio.shown(4), scores.mean_kl.shown(4)
    return f"{text}, perplexity x {ratio}, mean KLD {kl}"


Event = (
    LossesLayer
    | ExpertsScored
    | Started
    | StageStarted
    | TensorDone
    | TuningStep
    | LayerTuned
    | LayerDone
    | CopyDone
    | ValidationProgress
    | Finished
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listens to nothing."""
