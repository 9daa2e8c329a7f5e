"""MXFP8 (OCP Microscaling Formats 1.0): FP8 (e4m3) in groups of 32 with a power of two for a scale.

    weight ~ code * 2**(scale - 127)

The power is the least with which the group's largest weight stays below e4m3's top, 448: e4m3 spans 2**15 without loss
of precision, so that no other power is better but by chance. It is compressed-tensors' rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from quantkit.errors import SchemeError
from quantkit.schemes import fp4

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored, VectorGrid
    from quantkit.schemes.tunable import Tunable

GROUP = 32
FLOAT8_MAX = 448.0
_BIAS = 127
_TOP_CODE = 126
"""e4m3's code of 448; 127 is NaN. Codes of positive values rise with them."""
_SIGN = 128


class Mxfp8Scheme(BaseModel, frozen=True, extra="forbid"):
    """FP8 in groups of 32 with scales that are powers of two, as NVIDIA's Blackwell computes with it."""

    kind: Literal["mxfp8"] = "mxfp8"

    @property
    def group_size(self) -> int:
        """Weights along in_features that share a scale."""
        return GROUP

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
        return "MXFP8"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless a tensor of this shape (out_features, in_features) is whole groups."""
        fp4.check_groups(name, shape, self.label, GROUP)

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Bits per weight of codes and scales."""
        return 8 + 8 / GROUP

    def grid(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Mxfp8Grid:
        """The scales of weight (B, out, in) float32. Raises `SchemeError` for values that are not finite."""
        return Mxfp8Grid(_exponents(weight))

    def vector_grid(self, weight: Tensor, importance: Tensor | None) -> VectorGrid:
        """There is none: `has_grid`."""
        raise AssertionError(f"{self.label} codes weights one by one")

    def rounded(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Stored:
        """Scales and nearest codes of weight (B, out, in), ties to even, as `decode` takes them."""
        import torch

        exponents = _exponents(weight)
        units = weight.unflatten(-1, (-1, GROUP)) / _powers(exponents).unsqueeze(-1)
        codes = units.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        return {"codes": codes.flatten(-2), "scale": exponents}

    def tunable(self, stored: Stored) -> Tunable | None:
        """Nothing of stored matrices is tuned by gradients."""
        return None

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """codes (..., out, in) uint8, the bits of e4m3, scale (..., out, groups) uint8 -> weight (..., out, in)
        float32."""
        import torch

        values = codes.view(torch.float8_e4m3fn).float().view(*scale.shape, -1)
        return values.mul_(_powers(scale).unsqueeze(-1)).view(codes.shape)


@dataclass(frozen=True, slots=True)
class Mxfp8Grid:
    """A `Grid`. exponents (B, out, groups) uint8. Codes count the 253 different values from the lowest on."""

    exponents: Tensor
    scale_dtype: None = None
    zero: float = 0.0
    offset: None = None
    top: int = 2 * _TOP_CODE

    @property
    def scale(self) -> Tensor:
        """(B, out, groups) float32."""
        return _powers(self.exponents)

    @property
    def table(self) -> Tensor:
        """The finite values of e4m3, rising."""
        import torch

        return _rising(self.exponents.device).view(torch.float8_e4m3fn).float()

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        """The scale of the group: powers of two stay."""
        return _powers(self.exponents[..., group])

    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor:
        """There are no offsets."""
        raise AssertionError("MXFP8 has no offsets")

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """The bits of e4m3, and the exponents."""
        return {"codes": _rising(codes.device)[codes.int()], "scale": self.exponents}


def _rising(device: torch.device) -> Tensor:
    """(253,) uint8: e4m3's bits of -448 to 448; zero is the positive one."""
    import torch

    positive = torch.arange(_TOP_CODE + 1, dtype=torch.uint8, device=device)
    return torch.cat((positive[1:].flip(0) + _SIGN, positive))


def _exponents(weight: Tensor) -> Tensor:
    """weight (B, out, in) float32 -> biased exponents of the scales, (B, out, groups) uint8."""
    import torch

    largest = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    if not bool(largest.isfinite().all()):
        raise SchemeError("a weight is NaN or infinite.", hint="Repair the checkpoint, or keep this tensor.")
    share, exponent = torch.frexp(largest)  # largest = share * 2**exponent, 448 = 0.875 * 2**9
    wanted = exponent - 9 + (share >= FLOAT8_MAX / 512) + _BIAS
    return wanted.where(largest > 0, _BIAS).clamp(1, 254).byte()


def _powers(exponents: Tensor) -> Tensor:
    """Biased exponents uint8 -> powers of two, float32."""
    import torch

    power = exponents.int() - _BIAS
    return torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)
