"""The folder of a Fisher pass that `quantkit sensitivity` made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.documents.read import document_bytes, parsed_document
from quantkit.documents.sensitivity import PROGRESS, FisherProgress, SensitivityDocument, read_sensitivity
from quantkit.errors import OutputError


@dataclass(frozen=True, slots=True)
class SensitivityInspection:
    """A finished pass in folder ``path``."""

    path: Path
    document: SensitivityDocument

    @property
    def types(self) -> tuple[str, ...]:
        """Types whose losses some plan has measured."""
        losses = self.document.losses or {}
        return tuple(sorted({label for own in losses.values() for label in own}))


def inspect_sensitivity(folder: Path) -> SensitivityInspection:
    """Raises `OutputError` for a pass that is not finished, and for damaged documents."""
    unfinished = folder / PROGRESS
    if unfinished.is_file():
        found = parsed_document(unfinished, document_bytes(unfinished), FisherProgress)
        layers = len(found.job.sublayers)
        raise OutputError(
            f"{folder}: holds an unfinished Fisher pass: {found.forward} of {layers} layers forward, {found.backward} "
            "backward.",
            hint="The command that began it goes on with it.",
        )
    return SensitivityInspection(folder, read_sensitivity(folder))
