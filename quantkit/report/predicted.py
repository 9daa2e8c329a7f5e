"""What a choice of types expected of a checkpoint beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from quantkit.documents.conversion import ConversionDocument
from quantkit.report.contents import Block, Note, Table
from quantkit.report.quality import kld_text
from quantkit.report.scored import ScoredCheckpoint

HEAD = ("checkpoint", "expected mean KLD", "measured", "measured / expected")


def predicted(checkpoints: Sequence[ScoredCheckpoint]) -> Iterator[Block]:
    """A table of the checkpoints whose types were chosen for a size, nothing if there are none."""
    rows = [row for checkpoint in checkpoints if (row := _row(checkpoint)) is not None]
    if rows:
        yield Note("Types of these checkpoints were chosen for a size, by what they were expected to lose.")
        yield Table(HEAD, tuple(rows))


def _row(checkpoint: ScoredCheckpoint) -> tuple[str, ...] | None:
    conversion, score = checkpoint.conversion, checkpoint.score
    expected = None if conversion is None else _expected(conversion.document)
    if not expected or score is None:
        return None
    return checkpoint.label, f"{expected:.2g}", kld_text(score), f"{score.kld.mean / expected:.2f}"


def _expected(document: ConversionDocument) -> float | None:
    """``predicted_kl`` of the output in the recipe; of any other origin, nothing."""
    outputs = document.recipe.get("outputs")
    for output in cast("list[object]", outputs) if isinstance(outputs, list) else []:
        if isinstance(output, dict) and cast("dict[str, object]", output).get("name") == document.output:
            value = cast("dict[str, object]", output).get("predicted_kl")
            return float(value) if isinstance(value, float) else None
    return None
