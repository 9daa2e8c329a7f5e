"""W4A8-FP8: int4 in groups of 128, symmetric, for kernels that round the inputs to FP8 (e4m3) while serving.

    weight ~ (code - 8) * scale        scale = step * unit, step in e4m3, unit = (largest |scale| of the row) / 448

vLLM stores the scales of a row as FP8 steps of one number when it loads them. So they are such multiples from the
start, and codes are chosen for the scales that will be served. Scales may be negative, as those of `affine_int`. What
is rounded while serving, the inputs and each product of a code and a step, is not part of this grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from quantkit.schemes.affine_int import IntScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored, VectorGrid
    from quantkit.schemes.tunable import Tunable

INT4 = IntScheme(bits=4, group_size=128, symmetric=True, scale_dtype="bfloat16")
"""What lies in the file."""
_GROUP = 128
_LARGEST = 448.0
_SMALLEST = 0.125
"""An eighth of the steps is taken by vLLM, which leaves e4m3's subnormals out of reach below this."""
_LEAST_UNIT = 1 / (448 * 512)
"""What vLLM takes at least for the unit of a row."""


class W4AFp8Scheme(BaseModel, frozen=True, extra="forbid"):
    """int4 in groups of 128 for kernels that round inputs to FP8, which vLLM has for Hopper."""

    kind: Literal["w4afp8"] = "w4afp8"

    @property
    def group_size(self) -> int:
        """Weights along in_features that share a scale."""
        return _GROUP

    @property
    def has_grid(self) -> bool:
        """Whether single weights have levels of their own, so that a method can choose them one by one."""
        return True

    @property
    def shares_scale(self) -> bool:
        """Whether one number belongs to whole matrices, and to those that runtimes join with them."""
        return False

    @property
    def fits_tables(self) -> bool:
        """Whether formats also store matrices that no calibration input reaches in it (vocabulary, MTP)."""
        return False

    @property
    def label(self) -> str:
        """What tables and messages call it."""
        return "int4 g128 FP8 inputs"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless a tensor of this shape (out_features, in_features) is whole groups."""
        INT4.check(name, shape)

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Bits per weight of codes and scales."""
        return INT4.bpw(shape)

    def grid(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> W4AFp8Grid:
        """Fitted scales of weight (B, out, in) float32 under importance (B, in). ``points``, ``signed``: as ``grid``
        and ``signed`` of `affine_int.fit`."""
        scale, _ = INT4.fit(weight, importance, grid=points, signed=signed)
        empty = weight.unflatten(-1, (-1, _GROUP)).abs().amax(-1) == 0  # their scale must not raise the row's unit
        wanted = scale.float().masked_fill(empty, 0.0)
        unit = (wanted.abs().amax(-1, keepdim=True) / _LARGEST).clamp_min(_LEAST_UNIT)
        nearest = _nearest(wanted, unit)
        return W4AFp8Grid(nearest, unit, nearest.abs() >= nearest.abs().amax(-1, keepdim=True))

    def vector_grid(self, weight: Tensor, importance: Tensor | None) -> VectorGrid:
        """There is none: `has_grid`."""
        raise AssertionError(f"{self.label} codes weights one by one")

    def rounded(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Stored:
        """Fitted scales and nearest codes of weight (B, out, in), as `decode` takes them."""
        grid = self.grid(weight, importance, points=points, signed=signed)
        return grid.stored(INT4.encode(weight, grid.scale), grid.scale, None)

    def tunable(self, stored: Stored) -> Tunable | None:
        """Nothing of stored matrices is tuned by gradients."""
        return None

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """codes (..., out, in) uint8, scale (..., out, groups) bfloat16 -> weight (..., out, in) float32."""
        return INT4.decode(codes, scale)


@dataclass(frozen=True, slots=True)
class W4AFp8Grid:
    """A `Grid`. scale (B, out, groups) float32, bfloat16 values; unit (B, out, 1) float32; largest (B, out, groups)
    bool: the scales that the unit follows from."""

    scale: Tensor
    unit: Tensor
    largest: Tensor
    scale_dtype: None = None
    zero: float = 8.0
    offset: None = None
    top: int = 15
    table: None = None

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        """A step of the row's unit. The largest scale of a row stays."""
        return self.scale[..., group].where(self.largest[..., group], _nearest(wanted, self.unit[..., 0]))

    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor:
        """There are no offsets."""
        raise AssertionError("an integer grid has zero points, no offsets")

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """Codes and scales in bfloat16."""
        import torch

        return {"codes": codes, "scale": scale.to(torch.bfloat16)}


def _nearest(scale: Tensor, unit: Tensor) -> Tensor:
    """The nearest e4m3 multiples of unit but zero, rounded to bfloat16 as they are stored, float32."""
    import torch

    steps = (scale / unit).abs().clamp(_SMALLEST, _LARGEST).to(torch.float8_e4m3fn).float()
    return (steps * unit).copysign(scale).bfloat16().float()
