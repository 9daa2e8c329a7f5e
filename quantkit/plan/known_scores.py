"""Scores of experts that an earlier conversion found, in place of scoring them again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.pruning import Scores
from quantkit.documents.read import CONVERSION, document_bytes, parsed_document
from quantkit.errors import OutputError, PlanError, SourceError


def known_scores(path: Path, arch: ModelArch, fingerprint: str | None = None) -> Scores:
    """What quantkit.json in folder ``path`` says of the experts of the whole model ``arch``. ``fingerprint``: of the
    checkpoint that the scores must be of, None if only its config.json is there.

    Raises `OutputError` if nothing was pruned there or the file is damaged, `SourceError` for scores of another model.
    """
    file = path / CONVERSION
    if not file.is_file():
        raise OutputError(
            f"{path}: holds no {CONVERSION}.", hint="Give prune.scores the folder of an output that was pruned."
        )
    document = parsed_document(file, document_bytes(file), ConversionDocument)
    if document.pruning is None:
        raise OutputError(
            f"{path}: no experts were pruned there, so it has no scores.",
            hint="Leave prune.scores out: experts are then scored with the calibration text.",
        )
    experts = arch.routed_experts()
    count = 0 if experts is None else experts.count
    found = {len(scores) for scores in document.pruning.scores.values()}
    if found != {count}:
        have = ", ".join(f"{number:,}" for number in sorted(found)) or "no"
        raise SourceError(f"{path}: has scores of {have} experts a layer, the model has {count:,}: it is another one.")
    if fingerprint is not None and document.job.source != fingerprint:
        raise SourceError(
            f"{path}: has scores of another checkpoint; the same model in other files counts as another.",
            hint="Leave prune.scores out: experts are then scored with the calibration text.",
        )
    return document.pruning.scores


def refuse_unscored(path: Path, scores: Scores, layers: Collection[int]) -> None:
    """Raise `PlanError` unless all of ``layers`` have scores."""
    missing = sorted(set(layers) - scores.keys())
    if missing:
        raise PlanError(
            f"{path}: has no scores of layer {missing[0]}, whose experts an output keeps.",
            hint="Drop the MTP layer in every output, or leave prune.scores out.",
        )
