"""GPTQ."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from quantkit.quantizers.rtn import ScaleSearch


class Gptq(BaseModel, frozen=True, extra="forbid"):
    """Options of GPTQ. Each part of the stack is a switch, so that an ablation is one line of a recipe."""

    kind: Literal["gptq"] = "gptq"
    damp_percent: float = Field(0.01, gt=0, le=1, description="Fraction of mean(diag H) added to the diagonal.")
    act_order: Literal["none", "static"] = Field("static", description="Columns by falling diag(H); storage keeps its order.")
    scale_search: ScaleSearch = Field("importance", description="How the scale of a group is chosen.")
    grid: int = Field(40, ge=2, le=200, description="Candidate ranges tried for each group.")
    signed: bool = Field(True, description="Symmetric scales may be negative (the extra level on either side).")
    refits: int = Field(1, ge=0, le=8, description="Rounds of Hessian-aware scale refit, each followed by a new sweep but the last.")
    cross: float = Field(0.5, ge=0, le=1, description="How far targets follow the unquantised stream (0: plain GPTQ).")
    shrink: float = Field(3.0, ge=0, description="Pull of an expert's gate/up Hessian to the layer's pooled one, in in_features tokens.")
    down_shrink: float = Field(1.0, ge=0, description="Pull of an expert's down Hessian to its diagonal, in in_features tokens.")
    min_tokens: int = Field(128, ge=0, description="Experts with fewer tokens borrow those that came nearest to choosing them.")
