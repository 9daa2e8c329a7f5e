"""`convert --layers`: some layers of a conversion, compared with the original on held-out text, and what the whole will
take.

The calibration text goes through all layers up to the last named one. Layers that are not named stay as they are; MTP
layers, which come after all others, cannot be named.
Everything is done as the whole conversion does it: the same plan, the same loop, files of the same format, read back.
They lie in a folder OUT.trial-... that goes at the end: what is left is OUT.trial.json, a report.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.calibrate.dataset import TokenRows, eval_windows
from quantkit.convert.background import foreground
from quantkit.convert.conversion import Conversion
from quantkit.convert.events import Event, OnEvent, StageStarted, ValidationProgress
from quantkit.convert.fingerprint import journal_header
from quantkit.convert.finish import recipe_values, result_folder, write_side_files
from quantkit.convert.folder import OutputFolder
from quantkit.convert.journal import Journal
from quantkit.convert.opening import open_conversion, open_fisher, open_imatrix
from quantkit.convert.prepare import Job
from quantkit.convert.pruning import without_experts
from quantkit.convert.run import quantize_layers
from quantkit.convert.scheduled import schedule_of
from quantkit.convert.tally import Tally
from quantkit.documents.journal import TensorRecord
from quantkit.documents.trial import TrialDocument, TrialLayer, TrialOutput
from quantkit.errors import OutputError, PlanError, QuantkitError
from quantkit.evaluate.compare import LayerScore, Model, compare_layers
from quantkit.evaluate.validation import model_of
from quantkit.formats.model_source import source_name
from quantkit.formats.preallocated import disk_errors
from quantkit.inspect.trial import inspect_trial
from quantkit.plan.machine import Machine, peak_rss_bytes
from quantkit.plan.plan import OutputPlan
from quantkit.plan.recipe_validation import Validation
from quantkit.plan.schedule import FILES, VALIDATION, Schedule
from quantkit.plan.trial import trial_plan, trial_schedule
from quantkit.version import __version__

HELD_OUT = Validation.model_validate({"text": ["builtin:eval"], "max_windows_per_file": 8})
"""The text if the recipe names none."""


@contextmanager
def trial_folder(out: Path) -> Generator[Path]:
    """A folder beside ``out``, on its disk, that is removed at the end."""
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.trial-")
    with folder as name:
        yield Path(name)


def refuse_other_trial(path: Path, job: Job, layers: tuple[int, ...]) -> None:
    """Raise `OutputError` if ``path`` exists and is no report of these layers by this recipe."""
    if not os.path.lexists(path):
        return
    try:
        found = inspect_trial(path)
    except QuantkitError:
        found = None
    asked = (source_name(job.source), layers, recipe_values(job.plan.recipe))
    if found is None or (found.document.source, found.document.trial, found.document.recipe) != asked:
        raise OutputError(
            f"{path}: exists already, and is no trial of the same source, recipe and layers.",
            hint="Choose another -o, or replace it with --restart.",
        )


def try_layers(job: Job, layers: tuple[int, ...], machine: Machine, on_event: OnEvent) -> TrialDocument:
    """Quantise these layers of a prepared job, whose ``out`` lies in a `trial_folder`. Raises as `convert` does, and
    `PlanError` for layers that the model has not."""
    tally = Tally()

    def tell(event: Event) -> None:
        tally.add(event)
        on_event(event)

    if job.plan.recipe.prune is not None and job.scores is None:
        raise PlanError(
            "prune: a trial scores no experts, which takes the whole model.",
            hint="Give prune.scores, an output of an earlier conversion that pruned.",
        )
    part = replace(job, plan=trial_plan(job.plan, layers, job.arch))
    windows = _held_out(job)
    with ExitStack() as stack:
        stack.enter_context(foreground(machine.device))
        importance, sensitivity = open_imatrix(stack, job), open_fisher(job)
        names = [output.output.name for output in job.plan.outputs]
        folder = stack.enter_context(OutputFolder(job.out, names, restart=False))
        header = journal_header(job.plan.recipe, job.source, job.rows, importance, sensitivity, job.scores, machine)
        journal = Journal(folder.journal, header, job.source.files[0].parent)
        stack.callback(journal.close)
        job, whole = without_experts(job, folder, machine, tell)
        part = replace(part, source=job.source)
        conversion = open_conversion(stack, part, machine, folder, journal, importance, sensitivity, tell, whole)
        with conversion.timer.stage("compilation"):
            whole = schedule_of(replace(conversion, plan=job.plan), job.needs)
        quantize_layers(conversion, job.rows, trial_schedule(whole, layers, len(names), _passed(job, windows)))
        scores = [_validated(conversion, number, layers, windows) for number in range(len(names))]
    return _document(job, conversion, layers, windows, scores, _corrected(tally, whole))


def _held_out(job: Job) -> TokenRows:
    wanted = job.plan.recipe.validation or HELD_OUT
    return eval_windows(wanted.text, wanted.context, job.source.directory, job.base_dir, wanted.max_windows_per_file)


def _passed(job: Job, windows: TokenRows) -> float:
    """See `trial_schedule`."""
    work = job.needs.work
    return work.tokens * work.streams / (2 * windows.tokens.size)


def _validated(
    conversion: Conversion, number: int, layers: tuple[int, ...], windows: TokenRows
) -> tuple[LayerScore, ...]:
    """Read back what an output stores of the layers, and compare the hidden states after each."""
    output, sink, last = conversion.plan.outputs[number], conversion.sinks[number], layers[-1]
    directory = result_folder(conversion.folder, conversion.plan, output)
    with conversion.timer.stage("files"):
        conversion.on_event(StageStarted(FILES))
        sink.finish(conversion.journal.steps_of(number))
        write_side_files(conversion, output, directory)
    device, cache_bytes = conversion.machine.device, conversion.share.cache // 2
    named = str(conversion.source.directory)
    reference = model_of(conversion.arch, conversion.source, device, cache_bytes, name=named)
    conversion.on_event(StageStarted(VALIDATION))
    with conversion.timer.stage("validation"), ExitStack() as stack:
        candidate = reference
        if any(tensor.scheme is not None for tensor in output.planned):  # else it is the original
            written = stack.enter_context(output.target.open_written(directory))
            own = model_of(conversion.arch, written, device, cache_bytes, name=str(directory))
            candidate = _merged(reference, own, frozenset(written.infos()))
        (found,) = compare_layers(
            conversion.arch,
            reference,
            (candidate,),
            torch.from_numpy(windows.tokens).long(),
            conversion.stores.new,
            last + 1,
            on_layer=lambda layer: conversion.on_event(ValidationProgress(layer + 1, last + 1)),
        )
    return found


def _merged(reference: Model, own: Model, written: frozenset[str]) -> Model:
    """The original with the tensors that were written."""

    def forget() -> None:
        reference.forget()
        own.forget()

    def weights(name: str) -> Tensor:
        return (own if name in written else reference).weights(name)

    return replace(reference, weights=weights, forget=forget, name=own.name)


def _corrected(tally: Tally, whole: Schedule) -> dict[str, float]:
    """Seconds of the whole conversion by kind of step."""
    assert tally.pace is not None, "a trial has a schedule"
    seconds: dict[str, float] = {}
    for step in whole:
        seconds[step.kind] = seconds.get(step.kind, 0.0) + tally.pace.expected(step.kind, step.seconds)
    return seconds


@dataclass(frozen=True, slots=True)
class _Losses:
    mean: float | None
    fallbacks: int

    @classmethod
    def of(cls, records: Sequence[TensorRecord]) -> _Losses:
        mean = sum(record.relative_loss for record in records) / len(records) if records else None
        return cls(mean, sum(bool(record.fallback) for record in records))


def _document(
    job: Job,
    conversion: Conversion,
    layers: tuple[int, ...],
    windows: TokenRows,
    scores: list[tuple[LayerScore, ...]],
    whole_seconds: dict[str, float],
) -> TrialDocument:
    outputs = [_output(conversion, number, job.plan.outputs[number], layers, own) for number, own in enumerate(scores)]
    return TrialDocument(
        trial=layers,
        quantkit=__version__,
        device=conversion.machine.device_name,
        source=source_name(job.source),
        recipe=recipe_values(conversion.plan.recipe),
        outputs=tuple(outputs),
        windows=len(windows.tokens),
        tokens=windows.tokens.size,
        seconds=dict(conversion.timer.seconds),
        peak_rss_bytes=peak_rss_bytes(),
        whole_seconds=whole_seconds,
        disk_bytes=job.needs.disk_bytes,
    )


def _output(
    conversion: Conversion, number: int, output: OutputPlan, layers: tuple[int, ...], scores: tuple[LayerScore, ...]
) -> TrialOutput:
    records = conversion.journal.tensors_of(number)
    found: list[TrialLayer] = []
    fallbacks = 0
    for score in scores:
        own = [record for name, record in records.items() if output.decisions[name].spec.layer == score.layer]
        losses = _Losses.of(own)
        fallbacks += losses.fallbacks
        found.append(
            TrialLayer(
                layer=score.layer,
                quantised=score.layer in layers,
                hidden_error=score.hidden_error,
                router_agreement=score.router_agreement,
                relative_loss=losses.mean,
            )
        )
    return TrialOutput(name=output.output.name, nbytes=output.nbytes, layers=tuple(found), fallbacks=fallbacks)
