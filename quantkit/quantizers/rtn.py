"""Round to nearest: the scale of each group is searched, the codes are the nearest ones. Needs no calibration.

With calibration, or an imatrix, the scale search weights each input by its mean square.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calibrate.inputs import Inputs
    from quantkit.quantizers.batch import QuantizedBatch, QuantizedRows, Quantizer
    from quantkit.quantizers.ldlq.two_sided import OutputFactor
    from quantkit.schemes import ChosenScheme

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
    def needs_hessian(self) -> bool:
        """Whether the method takes whole second moments of the inputs."""
        return False

    @property
    def follows_original(self) -> bool:
        """Whether the method wants the unquantised stream beside the quantised one."""
        return False

    @property
    def output_aware(self) -> bool:
        """Whether the method takes output Hessians."""
        return False

    @property
    def row_gains(self) -> bool:
        """Whether rows get gains (`quantkit.quantizers.row_gains`)."""
        return False

    @property
    def shrinkage(self) -> tuple[float, float]:
        """None: the importance of single inputs needs few tokens."""
        return 0.0, 0.0

    def quantizer(self, stats: Inputs | None) -> Quantizer:
        """`quantize` for linears that these inputs feed, prepared once for all of them. Overwrites ``stats``."""
        return partial(self.quantize, prepared=self.prepare(stats))

    def prepare(self, stats: Inputs | None) -> Tensor | None:
        """What `quantize` needs of the inputs, shared by all linears that they feed: the imatrix (B, in) float32."""
        return None if stats is None else floored(stats.importance)

    def quantize(
        self,
        weight: Tensor,
        scheme: ChosenScheme,
        prepared: Tensor | None,
        reach: Tensor | None = None,
        output_factor: OutputFactor | None = None,
        to_residual: bool = False,
    ) -> QuantizedBatch:
        """weight (B, out, in) float32 -> codes and scales, a slice of rows at a time."""
        from quantkit.quantizers.batch import QuantizedBatch, in_slices

        parts = [self._quantize_rows(part, scheme, prepared, reach) for part in in_slices(weight, short=True)]
        return QuantizedBatch.of(scheme, parts, ("",) * len(weight))

    def _quantize_rows(
        self, weight: Tensor, scheme: ChosenScheme, prepared: Tensor | None, reach: Tensor | None
    ) -> QuantizedRows:
        from quantkit.quantizers.batch import QuantizedRows

        importance = weighting(prepared, self.scale_search)
        stored = scheme.rounded(weight, importance, points=grid_points(self), signed=self.signed, reach=reach)
        error = scheme.decode(**stored).sub_(weight)
        shares = 1.0 if prepared is None else prepared.unsqueeze(-2)
        loss, norm = ((values.square() * shares).sum(-1) for values in (error, weight))
        return QuantizedRows(stored, loss, norm)


class _SearchOptions(Protocol):
    @property
    def scale_search(self) -> ScaleSearch: ...
    @property
    def grid(self) -> int: ...


def floored(importance: Tensor) -> Tensor:
    """Importance (B, in) with a share of its mean added: inputs that never fired still count a little, a scale must not
    ignore them."""
    return importance + _FLOOR * importance.mean(-1, keepdim=True).clamp_min(1e-30)


def grid_points(method: _SearchOptions) -> int:
    """Candidate ranges to try, 0 for the whole range as it is."""
    return 0 if method.scale_search == "range" else method.grid


def weighting(importance: Tensor | None, search: ScaleSearch) -> Tensor | None:
    """The importance (B, in) where the search is to use it."""
    return importance if search == "importance" else None
