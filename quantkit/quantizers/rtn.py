"""Round to nearest: the scale of each group is searched, the codes are the nearest ones. Needs no calibration.

With calibration the scale search weights each input by its mean square (the imatrix of llama.cpp).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from quantkit.schemes import IntScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calibrate.inputs import InputStats
    from quantkit.quantizers.batch import QuantizedBatch, Quantizer

ScaleSearch = Literal["range", "mse", "importance"]
"""range: the group's whole range; mse: least squared weight error; importance: that error weighted by each input's mean
square."""

_FLOOR = 0.01  # the same share of the mean that GPTQ's damping adds by default


class Rtn(BaseModel, frozen=True, extra="forbid"):
    """Options of round to nearest."""

    kind: Literal["rtn"] = "rtn"
    scale_search: ScaleSearch = Field("importance", description="How the scale of a group is chosen.")
    grid: int = Field(40, ge=2, le=200, description="Candidate ranges tried for each group.")
    signed: bool = Field(True, description="Symmetric scales may be negative (the extra level on either side).")

    @property
    def needs_inputs(self) -> bool:
        """Whether the method can't work without calibration inputs."""
        return False

    @property
    def follows_original(self) -> bool:
        """Whether the method wants the unquantised stream beside the quantised one."""
        return False

    def quantizer(self, stats: InputStats | None) -> Quantizer:
        """`quantize` for linears that these inputs feed, prepared once for all of them. Overwrites ``stats``."""
        return partial(self.quantize, prepared=self.prepare(stats))

    def prepare(self, stats: InputStats | None) -> Tensor | None:
        """What `quantize` needs of the inputs, shared by all linears that they feed: the imatrix (B, in) float32."""
        if stats is None:
            return None
        importance = stats.hessian.diagonal(dim1=-2, dim2=-1)
        # Inputs that never fired still count a little: a scale must not ignore them.
        return importance + _FLOOR * importance.mean(-1, keepdim=True).clamp_min(1e-30)

    def quantize(self, weight: Tensor, scheme: IntScheme, prepared: Tensor | None) -> QuantizedBatch:
        """weight (B, out, in) float32 -> codes and scales."""
        from quantkit.quantizers.batch import QuantizedBatch

        scale, zero_point = search_scales(
            weight, scheme, prepared, search=self.scale_search, grid=self.grid, signed=self.signed
        )
        codes = scheme.encode(weight, scale, zero_point)
        error = scheme.decode(codes, scale, zero_point) - weight
        importance = 1.0 if prepared is None else prepared.unsqueeze(-2)
        norm = (weight.square() * importance).sum((-2, -1)).clamp_min(1e-30)
        return QuantizedBatch(
            scheme, codes, scale, zero_point, (error.square() * importance).sum((-2, -1)) / norm, ("",) * len(weight)
        )


def search_scales(
    weight: Tensor, scheme: IntScheme, importance: Tensor | None, *, search: ScaleSearch, grid: int, signed: bool
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group as a method's options say. weight (B, out, in), importance (B, in) or None."""
    weighting = importance if search == "importance" else None
    return scheme.fit(weight, weighting, grid=0 if search == "range" else grid, signed=signed)
