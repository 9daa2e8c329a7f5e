"""Documents -> checkpoints with their scores. A conversion and a candidate of an evaluation are the same checkpoint if
the candidate was read from the conversion's folder (or from one of its name) and has as many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from quantkit.documents.conversion import ConversionDocument, ValidationResult
from quantkit.documents.evaluation import Candidate, Evaluation, Result
from quantkit.documents.read import DocumentFile
from quantkit.documents.values import DraftAgreement, Mean


@dataclass(frozen=True, slots=True)
class Score:
    """Scores of a checkpoint against its reference. ``text``: the same for scores that can be compared, because
    the same tokens of the same reference were scored. ``quantiles``: (share of tokens with less, KLD in nats);
    ``lower_bound``: the true KLD is larger."""

    text: str
    measured_by: str
    windows: int
    tokens: int
    reference_perplexity: Mean
    perplexity: Mean
    log_ratio: Mean
    kld: Mean
    quantiles: tuple[tuple[float, float], ...]
    same_top: Mean
    lower_bound: bool = False
    draft: DraftAgreement | None = None


@dataclass(frozen=True, slots=True)
class LabelledConversion:
    """A conversion. ``folder``: where its document lies; ``written``: when."""

    label: str
    folder: Path
    document: ConversionDocument
    written: datetime


@dataclass(frozen=True, slots=True)
class LabelledEvaluation:
    """An evaluation with what its candidates are called here."""

    path: Path
    document: Evaluation
    written: datetime
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScoredCheckpoint:
    """A checkpoint: its size and, if it was measured, its scores. A checkpoint that two evaluations scored on
    different text is listed twice."""

    label: str
    nbytes: int
    bpw: float
    score: Score | None = None
    result: Result | None = None
    conversion: LabelledConversion | None = None


@dataclass(frozen=True, slots=True)
class ScoredCheckpoints:
    """Everything that the documents say, each checkpoint's scores beside it."""

    checkpoints: tuple[ScoredCheckpoint, ...]
    conversions: tuple[LabelledConversion, ...]
    evaluations: tuple[LabelledEvaluation, ...]


def scored_checkpoints(found: Sequence[DocumentFile]) -> ScoredCheckpoints:
    """Join conversions with the candidates of evaluations. Order: as given, conversions first."""
    conversions = _conversions([f for f in found if isinstance(f.document, ConversionDocument)])
    evaluations: list[LabelledEvaluation] = []
    scored: list[ScoredCheckpoint] = []
    for file in found:
        if isinstance(file.document, Evaluation):
            rows = [_candidate(file.document, candidate, conversions) for candidate in file.document.candidates]
            names = unique([(row.label, where) for row, where in rows])
            checkpoints = [replace(row, label=name) for (row, _), name in zip(rows, names, strict=True)]
            evaluations.append(LabelledEvaluation(file.path, file.document, file.written, tuple(names)))
            scored += checkpoints
    measured = {checkpoint.conversion.folder for checkpoint in scored if checkpoint.conversion is not None}
    alone = [_own(conversion) for conversion in conversions if conversion.folder not in measured]
    order = {conversion.folder: number for number, conversion in enumerate(conversions)}
    rows = sorted(
        (*alone, *scored), key=lambda row: len(order) if row.conversion is None else order[row.conversion.folder]
    )
    return ScoredCheckpoints(tuple(rows), conversions, tuple(evaluations))


def unique(names: Sequence[tuple[str, Path]]) -> list[str]:
    """Names, with the folder above in front of those that occur twice, or the whole path if that is not enough."""
    plain = [name for name, _ in names]
    longer = [name if plain.count(name) == 1 else f"{where.parent.name}/{name}" for name, where in names]
    return [name if longer.count(name) == 1 else str(where) for name, (_, where) in zip(longer, names, strict=True)]


def front(checkpoints: Iterable[ScoredCheckpoint]) -> tuple[ScoredCheckpoint, ...]:
    """Checkpoints that no other of the same text beats or equals in both size and mean KLD, smallest first."""
    best, kept = math.inf, list[ScoredCheckpoint]()
    scored = [(one.nbytes, one.score.kld.mean, one) for one in checkpoints if one.score is not None]
    for _, kld, checkpoint in sorted(scored, key=lambda row: row[:2]):
        if kld < best:
            best = kld
            kept.append(checkpoint)
    return tuple(kept)


def _conversions(found: Sequence[DocumentFile]) -> tuple[LabelledConversion, ...]:
    folders = [file.path.resolve().parent for file in found]
    labels = unique([(folder.name, folder) for folder in folders])
    return tuple(
        LabelledConversion(label, folder, file.document, file.written)
        for label, folder, file in zip(labels, folders, found, strict=True)
        if isinstance(file.document, ConversionDocument)
    )


def _candidate(
    evaluation: Evaluation, found: Candidate, conversions: Sequence[LabelledConversion]
) -> tuple[ScoredCheckpoint, Path]:
    """A candidate as a checkpoint, and where it was read from."""
    model, path = found.model, Path(found.model.path)
    conversion = next((c for c in conversions if _same(c, found)), None)
    checkpoint = ScoredCheckpoint(
        model.name if conversion is None else conversion.label,
        model.nbytes,
        model.bpw if conversion is None else conversion.document.bpw,
        _evaluated(evaluation, found.result),
        found.result,
        conversion,
    )
    return checkpoint, path


def _same(conversion: LabelledConversion, candidate: Candidate) -> bool:
    if candidate.model.nbytes != conversion.document.tensor_bytes or "\0" in candidate.model.path:
        return False  # no file has such a name, and no path can be made of it
    path = Path(candidate.model.path).resolve()
    if conversion.folder in (path, path.parent):
        return True
    return conversion.folder.name in (path.name, path.parent.name)


def _own(conversion: LabelledConversion) -> ScoredCheckpoint:
    """A conversion that no evaluation scored, with what its own validation found."""
    document = conversion.document
    score = None if document.validation is None else _validated(document.validation)
    return ScoredCheckpoint(conversion.label, document.tensor_bytes, document.bpw, score, None, conversion)


def _evaluated(evaluation: Evaluation, result: Result) -> Score:
    scores = result.overall
    kld, file = scores.kld, evaluation.reference_file
    measured = f"{evaluation.tokens_sha256} {evaluation.reference.fingerprint} {evaluation.protocol.name}"
    return Score(
        text=measured if file is None else f"{measured} {file.top}",
        measured_by="evaluation",
        windows=scores.windows,
        tokens=scores.tokens,
        reference_perplexity=scores.reference_perplexity,
        perplexity=scores.perplexity,
        log_ratio=scores.log_ratio,
        kld=Mean(mean=kld.mean, standard_error=kld.standard_error),
        quantiles=((0.5, kld.median), (0.9, kld.p90), (0.99, kld.p99), (0.999, kld.p999)),
        same_top=scores.same_top,
        lower_bound=file is not None,
        draft=result.draft,
    )


def _validated(validation: ValidationResult) -> Score:
    """The ratio of perplexities as its logarithm, its error by the delta method."""
    scores = validation.scores
    ratio, reference = scores.perplexity_ratio, scores.reference_perplexity
    known = ratio.mean > 0
    return Score(
        # No digest of the text is recorded: the same reference has the same perplexity on the same text only.
        text=f"validation {scores.windows} {scores.tokens} {reference.mean!r}",
        measured_by="validation of the conversion",
        windows=scores.windows,
        tokens=scores.tokens,
        reference_perplexity=reference,
        perplexity=scores.candidate_perplexity,
        log_ratio=Mean(
            mean=math.log(ratio.mean) if known else math.nan,
            standard_error=ratio.standard_error / ratio.mean if known else math.nan,
        ),
        kld=scores.mean_kl,
        quantiles=((0.5, scores.median_kl), (0.99, scores.p99_kl)),
        same_top=scores.top1,
        draft=scores.draft,
    )
