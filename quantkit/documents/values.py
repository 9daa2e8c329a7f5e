"""What all documents are made of: numbers as JSON can say them, counts, means with their errors."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]
"""NaN here and null in the file, for what JSON has no word for: the standard error of a single window."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""How many: no file makes an integer that is too large for a float."""


class DocumentPart(BaseModel):
    """An object of a document. Files may come from strangers and from other versions: keys that this version does not
    know are skipped, and a field has a default where readers can do without it."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Mean(DocumentPart):
    """A value and its standard error over windows."""

    mean: Number
    standard_error: Number = math.nan

    def shown(self, digits: int) -> str:
        """ "1.2345 ± 0.0067"; "-" for the error of a single window."""
        return estimate(self.mean, self.standard_error, digits)

    def percent(self) -> str:
        """ "12.34% ± 0.56%"."""
        return percent(self.mean, self.standard_error)


class DraftAgreement(DocumentPart):
    """Of a checkpoint that has an MTP layer: the share of positions where the token that the MTP layer puts first is
    the one that the same checkpoint puts first one position later, where it predicts the same token. That is what
    speculative decoding with greedy sampling accepts of first drafts."""

    reference: Mean | None = None
    """The reference's MTP layer against the reference; null if it was not run, or has none."""
    candidate: Mean
    """The candidate's MTP layer against the candidate."""

    def shown(self) -> str:
        """ "61.23% ± 0.30% (original 62.10% ± 0.31%)"."""
        original = "" if self.reference is None else f" (original {self.reference.percent()})"
        return self.candidate.percent() + original


_TABLE_WIDTH = 1e7  # from here on digits break tables


def estimate(mean: float, error: float, digits: int) -> str:
    """ "1.2345 ± 0.0067", and "1.2345 ± -" where one window says nothing of the error."""
    return f"{fixed(mean, digits)} ± {'-' if math.isnan(error) else fixed(error, digits)}"


def fixed(value: float, digits: int) -> str:
    """ "1.2345", and "1.2e+30" for what a broken model brings about."""
    return f"{value:.{digits}f}" if abs(value) < _TABLE_WIDTH else f"{value:.1e}"


def percent(mean: float, error: float) -> str:
    """ "12.34% ± 0.56%", and "12.34% ± -"."""
    return f"{fixed(100 * mean, 2)}% ± {'-' if math.isnan(error) else f'{fixed(100 * error, 2)}%'}"
