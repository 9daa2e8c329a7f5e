"""`evaluate`: a reference and candidates of any format through one layer-by-layer stream -> `Evaluation`.

Weights of one layer of one model at a time; hidden states in memory while they fit half of the budget, else in a
temporary folder; logits in blocks of the vocabulary. What was learnt of the reference can be kept in a file, which then
stands for it.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.arch.base import ModelArch
from quantkit.documents.evaluation import (
    Candidate,
    Evaluation,
    EvaluationText,
    NoiseFloor,
    ReferenceFile,
    Result,
)
from quantkit.documents.reference import ReferenceRecord
from quantkit.evaluate.events import EvaluationStarted, LayerPassed, OnEvaluation
from quantkit.evaluate.open import Evaluated
from quantkit.evaluate.prepare import AgainstFile, AgainstFolder
from quantkit.evaluate.reference_file import TOP, ReferenceStatistics, ReferenceWriter
from quantkit.evaluate.reference_scores import FileRecorder
from quantkit.evaluate.statistics import result_of
from quantkit.evaluate.stream import EvaluationRun, device_name
from quantkit.evaluate.validation import BF16_ROUNDING
from quantkit.formats.source import read_config
from quantkit.plan.machine import Machine, Timer
from quantkit.plan.schedule import layer_work, weighted
from quantkit.version import __version__

ARITHMETIC = "float32; weights decoded as they are stored, activations not quantised"
LOWER_BOUND = (
    "A lower bound: exact on the reference's {top} most likely tokens, all others as one. Perplexities, ratios, first "
    "choices and changes of probability are exact."
)
_NO_HIDDEN = "The reference's hidden states are not kept in its file (for DeepSeek V3 1.7 MB for each token)."
_NO_FLOOR = "The file was written without it."


def evaluate(
    prepared: AgainstFolder | AgainstFile, machine: Machine, on_event: OnEvaluation, *, noise_floor: bool, times: bool
) -> Evaluation:
    """Score the candidates that are open. ``noise_floor``: also the reference against itself, rounded to bfloat16;
    ``times``: put wall seconds into the document.

    Raises a `QuantkitError` with one line for whatever a file or the machine can cause.
    """
    job = _Job(machine, Timer(), noise_floor, on_event)
    job.timer.seconds["open"] = prepared.seconds
    found = job.against_folder(prepared) if isinstance(prepared, AgainstFolder) else job.against_file(prepared)
    return found.model_copy(update={"seconds": dict(job.timer.seconds)}) if times else found


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything but the models."""

    machine: Machine
    timer: Timer
    noise_floor: bool
    on_event: OnEvaluation

    def against_folder(self, opened: AgainstFolder) -> Evaluation:
        """The reference goes through the layers beside the candidates, and into the file ``save``."""
        original, others, protocol = opened.original, opened.candidates, opened.protocol
        record = _record(self.machine, opened)
        tokens = torch.from_numpy(opened.windows.tokens).long()
        with ExitStack() as stack:
            writer = None
            if opened.save is not None:
                writer = stack.enter_context(ReferenceWriter(opened.save, record, tokens, original.arch.n_layers))
            stream = self._start(original.arch, others, tokens, 0 if writer is None else record.top)
            with self.timer.stage("stream"):
                found = stream.compare(
                    original,
                    others,
                    tokens,
                    protocol.context - 1 - protocol.scored_per_window,
                    noise_floor=self.noise_floor,
                    recorder=None if writer is None else FileRecorder(writer),
                )
            results = [result_of(comparison, opened.windows.domains) for comparison in found]
            floor = NoiseFloor(rounding=BF16_ROUNDING, result=results.pop(0)) if self.noise_floor else None
            if writer is not None:
                writer.finish(floor)
        return self._document(record, floor, others, results)

    def against_file(self, opened: AgainstFile) -> Evaluation:
        """The reference is what an earlier run kept of it."""
        reference, others = opened.reference, opened.candidates
        record = reference.record
        stream = self._start(opened.arch, others, reference.tokens, record.top)
        with self.timer.stage("stream"):
            found = stream.compare_recorded(reference, others)
        results = [result_of(comparison, record.window_domains) for comparison in found]
        floor = record.noise_floor if self.noise_floor else None
        return self._document(record, floor, others, results, self._file_facts(reference))

    def _start(self, arch: ModelArch, others: Sequence[Evaluated], tokens: Tensor, top: int) -> EvaluationRun:
        schedule = weighted(layer_work(arch, tokens.numel()))
        self.on_event(EvaluationStarted(len(others), len(tokens), tokens.numel(), arch.n_layers, schedule))
        return EvaluationRun(self.machine, arch, lambda layer: self.on_event(LayerPassed(layer, arch.n_layers)), top)

    def _file_facts(self, reference: ReferenceStatistics) -> ReferenceFile:
        record = reference.record
        missing = {"hidden_error": _NO_HIDDEN, "expert_errors": _NO_HIDDEN}
        if self.noise_floor and record.noise_floor is None:
            missing["noise_floor"] = _NO_FLOOR
        return ReferenceFile(
            path=str(reference.path),
            versions=record.versions,
            device=record.device,
            top=record.top,
            mean_rest=reference.mean_rest(),
            kld=LOWER_BOUND.format(top=record.top),
            not_available=missing,
        )

    def _document(
        self,
        record: ReferenceRecord,
        floor: NoiseFloor | None,
        others: Sequence[Evaluated],
        results: Sequence[Result],
        reference_file: ReferenceFile | None = None,
    ) -> Evaluation:
        return Evaluation(
            versions=_versions(),
            device=device_name(self.machine.device),
            arithmetic=ARITHMETIC,
            protocol=record.protocol,
            text=record.text,
            tokens_sha256=record.tokens_sha256,
            reference=record.reference,
            noise_floor=floor,
            candidates=tuple(
                Candidate(model=other.facts, result=result) for other, result in zip(others, results, strict=True)
            ),
            window_domains=record.window_domains,
            reference_file=reference_file,
        )


def _versions() -> dict[str, str]:
    return {"quantkit": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _record(machine: Machine, opened: AgainstFolder) -> ReferenceRecord:
    original, windows = opened.original, opened.windows
    return ReferenceRecord(
        versions=_versions(),
        device=device_name(machine.device),
        arithmetic=ARITHMETIC,
        reference=original.facts,
        config=dict(read_config(Path(original.facts.path))),
        tokenizer_sha256=opened.tokenizer,
        protocol=opened.protocol,
        text=tuple(
            EvaluationText(file=p.file, sha256=p.sha256, documents=p.documents, tokens=p.tokens, windows=p.rows)
            for p in windows.provenance
        ),
        window_domains=windows.domains,
        tokens_sha256=hashlib.sha256(windows.tokens.tobytes()).hexdigest(),
        top=min(TOP, original.arch.vocab_size),
        vocab_size=original.arch.vocab_size,
    )
