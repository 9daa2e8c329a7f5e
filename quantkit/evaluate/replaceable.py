"""Which file `evaluate` may replace: an older evaluation of the same models, by their paths, on the same text. Anything
else may be hours of work."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.documents.evaluation import CheckpointFacts, Evaluation, ScoringProtocol
from quantkit.documents.read import read_documents
from quantkit.errors import OutputError, QuantkitError
from quantkit.evaluate.prepare import AgainstFile, AgainstFolder


def refuse_other_evaluation(path: Path, opened: AgainstFolder | AgainstFile) -> None:
    """Raise `OutputError` if ``path`` exists and is no evaluation of what is open."""
    if not os.path.lexists(path):
        return
    try:
        (found,) = read_documents([path])
    except QuantkitError:
        found = None
    same = found is not None and isinstance(found.document, Evaluation) and _facts(found.document) == _asked(opened)
    if not same:
        raise OutputError(
            f"{path}: exists already, and is no evaluation of the same models on the same text.",
            hint="Choose another -o, or replace it with --force.",
        )


def _facts(found: Evaluation) -> object:
    text = [(file.file, file.sha256) for file in found.text]
    return _comparable(found.reference, [candidate.model for candidate in found.candidates], found.protocol, text)


def _asked(opened: AgainstFolder | AgainstFile) -> object:
    models = [candidate.facts for candidate in opened.candidates]
    if isinstance(opened, AgainstFile):
        record = opened.reference.record
        text = [(file.file, file.sha256) for file in record.text]
        return _comparable(record.reference, models, record.protocol, text)
    text = [(file.file, file.sha256) for file in opened.windows.provenance]
    return _comparable(opened.original.facts, models, opened.protocol, text)


def _comparable(
    reference: CheckpointFacts, models: list[CheckpointFacts], protocol: ScoringProtocol, text: list[tuple[str, str]]
) -> object:
    cut = (protocol.name, protocol.context, protocol.max_windows_per_file)
    return reference.path, [model.path for model in models], cut, text
