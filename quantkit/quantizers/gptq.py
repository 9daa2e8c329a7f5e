"""GPTQ (arXiv 2210.17323) as LDLQ, with the parts that earned their place on a trained Mixture-of-Experts model:

scales searched under diag(H) and signed; columns by falling diag(H) on static groups (nothing is permuted in the file); targets that
follow the unquantised stream (`cross`); Hessian-aware scale refits with a new sweep after each; the best round kept row by row.
The numerics are in `quantkit.quantizers.ldlq`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from quantkit.quantizers.rtn import ScaleSearch, search_scales
from quantkit.schemes import IntScheme
from quantkit.schemes.affine_int import representable

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calibrate.inputs import InputStats
    from quantkit.quantizers.batch import QuantizedBatch
    from quantkit.quantizers.ldlq import Factor


@dataclass(frozen=True, slots=True)
class PreparedInputs:
    """One factor for all linears that the same tokens feed. importance (B, in): diag(H) before damping."""

    factor: Factor
    cross: Tensor | None
    importance: Tensor


class Gptq(BaseModel, frozen=True, extra="forbid"):
    """Options of GPTQ. Each part of the stack is a switch, so that an ablation is one line of a recipe."""

    kind: Literal["gptq"] = "gptq"
    damp_percent: float = Field(0.01, gt=0, le=1, description="Fraction of mean(diag H) added to the diagonal.")
    act_order: Literal["none", "static"] = Field(
        "static", description="Columns by falling diag(H); storage keeps its order."
    )
    scale_search: ScaleSearch = Field("importance", description="How the scale of a group is chosen.")
    grid: int = Field(40, ge=2, le=200, description="Candidate ranges tried for each group.")
    signed: bool = Field(True, description="Symmetric scales may be negative (the extra level on either side).")
    refits: int = Field(
        2, ge=0, le=16, description="Hessian-aware scale refits, with a new sweep between one and the next."
    )
    cross: float = Field(0.5, ge=0, le=1, description="How far targets follow the unquantised stream (0: plain GPTQ).")
    shrink: float = Field(
        3.0, ge=0, description="Pull of an expert's gate/up Hessian to the layer's, in in_features tokens."
    )
    down_shrink: float = Field(
        1.0, ge=0, description="Pull of an expert's down Hessian to its diagonal, in in_features tokens."
    )

    @property
    def needs_inputs(self) -> bool:
        """Whether the method can't work without calibration inputs."""
        return True

    def prepare(self, stats: InputStats | None) -> PreparedInputs:
        """Factor the Hessians once for all linears of the group. Overwrites ``stats``."""
        from quantkit.quantizers import ldlq

        assert stats is not None, "the plan admits gptq with calibration only"
        importance = stats.hessian.diagonal(dim1=-2, dim2=-1).clone()
        factor = ldlq.factorize(stats.hessian, self.damp_percent, act_order=self.act_order == "static")
        return PreparedInputs(factor, stats.cross if self.cross else None, importance)

    def quantize(self, weight: Tensor, scheme: IntScheme, prepared: PreparedInputs) -> QuantizedBatch:
        """weight (B, out, in) float32 -> codes and scales."""
        from quantkit.quantizers import ldlq
        from quantkit.quantizers.batch import QuantizedBatch

        factor = prepared.factor
        norm = ldlq.row_loss(weight, factor.hessian).sum(-1).clamp_min(1e-30)
        target = weight
        if prepared.cross is not None:
            target = ldlq.towards_original(weight, prepared.cross, factor, self.cross)
        scale, zero_point = search_scales(
            target, scheme, prepared.importance, search=self.scale_search, grid=self.grid, signed=self.signed
        )
        codes, loss = ldlq.sweep(scheme, target, scale, zero_point, factor)
        for round_number in range(self.refits):
            new_scale = ldlq.refit(scheme, target, codes, scale, zero_point, factor.hessian)
            new_scale = representable(scheme, new_scale).to(scale.dtype)
            new_codes = codes
            if round_number + 1 < self.refits:
                new_codes, new_loss = ldlq.sweep(scheme, target, new_scale, zero_point, factor)
            else:
                new_loss = ldlq.row_loss(target - scheme.decode(codes, new_scale, zero_point), factor.hessian)
            better = (new_loss < loss).unsqueeze(-1)
            codes, scale = new_codes.where(better, codes), new_scale.where(better, scale)
            loss = new_loss.minimum(loss)
        fallback = "" if factor.damping == 1 else f"damp_percent raised {factor.damping:g} times"
        return QuantizedBatch(scheme, codes, scale, zero_point, loss.sum(-1) / norm, fallback)
