"""The report that a trial (`convert --layers`) left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.documents.read import IS_TRIAL, document_bytes, kind_of, parsed_document
from quantkit.documents.trial import TrialDocument


@dataclass(frozen=True, slots=True)
class TrialInspection:
    """OUT.trial.json at ``path``."""

    path: Path
    document: TrialDocument


def inspect_trial(path: Path) -> TrialInspection | None:
    """None for another JSON object. Raises `OutputError` for a damaged document."""
    content = document_bytes(path)
    if kind_of(path, content) != IS_TRIAL:
        return None
    return TrialInspection(path, parsed_document(path, content, TrialDocument))
