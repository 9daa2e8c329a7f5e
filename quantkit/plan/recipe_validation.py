"""What a recipe says of the check at a conversion's end."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, Field, field_validator

from quantkit.plan.recipe_values import fault


class Validation(BaseModel, frozen=True, extra="forbid"):
    """Perplexity and KL divergence of each output against the reference forward pass of the source, with limits."""

    text: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="`builtin:NAME`, files and globs of .txt, .jsonl, .parquet; relative to the recipe's folder."
    )
    context: int = Field(512, ge=2, le=2**20, strict=True, description="Tokens of a window.")
    max_windows_per_file: int | None = Field(
        None, ge=1, strict=True, description="At most this many windows of each file, evenly spread; null: all."
    )
    max_perplexity_increase: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description='Largest growth of perplexity, as "2%" or 0.02; null: no limit.',
        json_schema_extra={"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}, {"type": "null"}]},
    )
    max_mean_kl: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Largest mean KL divergence in nats per token; null: no limit."
    )

    @property
    def has_limits(self) -> bool:
        """Whether a result can fail: without limits scores are measured and nothing is promised."""
        return self.max_perplexity_increase is not None or self.max_mean_kl is not None

    @field_validator("max_perplexity_increase", mode="before")
    @classmethod
    def _percent(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", value, re.ASCII)
        if found is None:
            raise fault(f'found {value[:40]!r}, needed a percentage such as "2%" or a fraction such as 0.02')
        return float(found[1]) / 100
