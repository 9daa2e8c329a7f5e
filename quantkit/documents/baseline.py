"""A baseline: a committed JSON file with an older evaluation, and the losses that its conversions reported. Plain
values, no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.evaluation import Evaluation
from quantkit.documents.json_text import json_text
from quantkit.documents.values import DocumentPart, Number


class ConversionLosses(DocumentPart):
    """What a conversion said of its own losses."""

    calibration: dict[str, JsonValue] | None
    """The recipe's, without the seed: losses on other amounts or kinds of text are no comparison."""
    losses: dict[str, Number]
    """relative_loss of each linear, four significant digits; null for one that was no number."""

    @classmethod
    def of(cls, conversion: ConversionDocument) -> ConversionLosses:
        """The losses in a quantkit.json."""
        calibration = conversion.recipe.get("calibration")
        settings = calibration if isinstance(calibration, dict) else None
        losses = {name: linear.relative_loss for name, linear in conversion.tensors.items()}
        return cls(
            calibration=None if settings is None else {key: item for key, item in settings.items() if key != "seed"},
            losses={name: float(f"{loss:.4g}") for name, loss in losses.items() if loss is not None},
        )


class Baseline(DocumentPart):
    """The whole document."""

    kind: Literal["quantkit baseline"] = "quantkit baseline"
    schema_version: Literal[1] = 1
    evaluation: Evaluation
    conversions: dict[str, ConversionLosses] = Field(default_factory=dict)
    """By the candidate's name."""

    def to_json(self) -> str:
        """The file's text."""
        evaluation = self.evaluation.model_copy(update={"seconds": None})
        document = self.model_dump(mode="json", exclude={"evaluation"})
        return json_text({**document, "evaluation": evaluation.document()})
