"""The key ``prune`` of a recipe, and the word of --prune."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints, field_validator
from pydantic.config import JsonDict

from quantkit.plan.recipe_values import fault

_SHARE = re.compile(r"\s*(\d{1,2}(?:\.\d{1,6})?)\s*%\s*", re.ASCII)
_NEEDED = 'needed a share such as "25%", or how many of each layer, such as 64'


def _number_or_share(schema: JsonDict) -> None:
    schema["anyOf"] = [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$"}]


class Prune(BaseModel, frozen=True, extra="forbid"):
    """Routed experts that are left out of every output: those whose outputs add least (REAP, arXiv 2510.13999)."""

    experts: str | int = Field(
        description="How many of the routed experts of each layer go: a share, rounded down to what the router's "
        'groups allow ("25%"), or a number (64).',
        json_schema_extra=_number_or_share,
    )
    scores: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = Field(
        None,
        description="An output of an earlier conversion of this checkpoint that pruned, whose scores are taken; "
        "relative to the recipe's folder. null: experts are scored with the calibration text first.",
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _means_something(cls, value: object) -> object:
        found = f"found {value!r:.40}"
        if isinstance(value, str):
            share = _SHARE.fullmatch(value)
            if share is None or float(share[1]) == 0:
                raise fault(f"{found}, {_NEEDED}")
        elif not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**16:
            raise fault(f"{found}, {_NEEDED}")
        return value

    @property
    def share(self) -> float | None:
        """Of the experts, None if a number is given."""
        found = _SHARE.fullmatch(self.experts) if isinstance(self.experts, str) else None
        return None if found is None else float(found[1]) / 100


def parse_prune(text: str) -> str | int:
    """The value of --prune: "25%" or 64. Raises `ValueError`."""
    word = text.strip()
    if _SHARE.fullmatch(word) and float(word.rstrip("% ")) > 0:
        return word
    if re.fullmatch(r"\d{1,5}", word, re.ASCII) and int(word) > 0:
        return int(word)
    raise ValueError(f"found {text[:40]!r}, {_NEEDED}")
