"""How large an output may be, in place of rules that say what each linear is stored in (`quantkit.plan.allocation`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, field_validator, model_validator

from quantkit.plan.recipe_values import fault, parse_size
from quantkit.runtimes.gpus import Gpus, parse_gpus


class OutputTarget(BaseModel, frozen=True, extra="forbid"):
    """One of ``size``, ``bpw`` and ``gpus``."""

    size: int | str | None = Field(
        None,
        description="Largest sum of the weight files, headers included: bytes, or a number with unit, such as 350GB.",
    )
    bpw: float | None = Field(
        None,
        gt=0,
        le=32,
        allow_inf_nan=False,
        description="Most stored bits per weight of the whole checkpoint, as `quantkit plan` counts them.",
    )
    gpus: str | None = Field(
        None, description="GPUs that must hold it under vLLM (GGUF: llama.cpp), such as 5xA100-80GB."
    )
    context: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="Tokens of the sequence that gpus must fit; null: 32,768, or what the model is made for if less.",
    )
    types: Annotated[tuple[str, ...], Field(max_length=40)] = Field(
        (), description="Types to choose among, such as Q4_K, or int4 g128; empty: all that the output's runtime loads."
    )

    @field_validator("size", mode="before")
    @classmethod
    def _is_size(cls, size: object) -> object:
        if size is None:
            return None
        if isinstance(size, bool) or not isinstance(size, int | str):
            raise fault(f"found {str(size)[:40]!r}, needed bytes, or a number with unit such as 350GB")
        try:
            parse_size(str(size))
        except ValueError as error:
            raise fault(str(error)) from None
        return size

    @field_validator("gpus")
    @classmethod
    def _are_gpus(cls, gpus: str | None) -> str | None:
        try:
            return gpus if gpus is None else str(parse_gpus(gpus))
        except ValueError as error:
            raise fault(str(error)) from None

    @model_validator(mode="after")
    def _one_limit(self) -> OutputTarget:
        given = [key for key in ("size", "bpw", "gpus") if getattr(self, key) is not None]
        if len(given) != 1:
            raise fault(f"found {' and '.join(given) or 'no limit'}, needed exactly one of: size, bpw, gpus")
        if self.context is not None and self.gpus is None:
            raise fault("found context without gpus, needed both: it is the sequence that the GPUs must fit")
        return self

    @property
    def nbytes(self) -> int | None:
        """``size`` in bytes."""
        return None if self.size is None else parse_size(str(self.size))

    @property
    def parsed_gpus(self) -> Gpus | None:
        """``gpus``, known by name and memory."""
        return None if self.gpus is None else parse_gpus(self.gpus)

    def __str__(self) -> str:
        """What was asked for, in a few words."""
        if self.gpus is not None:
            return self.gpus
        return f"{self.bpw:g} bpw" if self.bpw is not None else f"{self.nbytes:,} bytes"
