"""The record in a file of reference statistics: what is known of the reference beside its numbers. Plain values, no
torch."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from quantkit.documents.evaluation import CheckpointFacts, EvaluationText, NoiseFloor, ScoringProtocol
from quantkit.documents.values import DocumentPart

REFERENCE_KIND = "quantkit reference statistics"


class ReferenceRecord(DocumentPart):
    """JSON inside the file. Unknown keys are refused: the numbers beside it might mean something else."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["quantkit reference statistics"] = REFERENCE_KIND
    version: Literal[1] = 1
    versions: dict[str, str]
    device: str
    arithmetic: str
    reference: CheckpointFacts
    config: dict[str, object]
    """Raw config.json."""
    tokenizer_sha256: str | None
    """sha256 (hex) of the reference's tokenizer.json."""
    protocol: ScoringProtocol
    text: tuple[EvaluationText, ...]
    window_domains: tuple[str, ...]
    tokens_sha256: str
    top: int
    vocab_size: int
    noise_floor: NoiseFloor | None = None
