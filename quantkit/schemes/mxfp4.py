"""MXFP4 (OCP Microscaling): FP4 in groups of 32 with a power of two for a scale, as compressed-tensors stores it.

    weight ~ level[code] * 2**(scale - 127)

The grid is that of ggml's block type of the same name, which counts levels in halves; only the bytes differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from quantkit.schemes import fp4
from quantkit.schemes.ggml.scheme import BlockGrid
from quantkit.schemes.ggml.types import BLOCK_TYPES

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored, VectorGrid
    from quantkit.schemes.tunable import Tunable

_BLOCK = BLOCK_TYPES["MXFP4"]
_BIAS = 127


class Mxfp4Scheme(BaseModel, frozen=True, extra="forbid"):
    """FP4 in groups of 32 with scales that are powers of two. In GGUF files it is the block type MXFP4."""

    kind: Literal["mxfp4"] = "mxfp4"

    @property
    def group_size(self) -> int:
        """Weights along in_features that share a scale."""
        return _BLOCK.group

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
        return "MXFP4"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless a tensor of this shape (out_features, in_features) is whole groups."""
        fp4.check_groups(name, shape, self.label, _BLOCK.group)

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Bits per weight of codes and scales."""
        return 4 + 8 / _BLOCK.group

    def grid(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Mxfp4Grid:
        """Fitted scales of weight (B, out, in) float32 under importance (B, in): the best of the powers of two near the
        group's range. Raises `SchemeError` for values that no group holds."""
        from quantkit.schemes.ggml.fit import fit

        return Mxfp4Grid(_BLOCK, fit(_BLOCK, weight, importance))

    def vector_grid(self, weight: Tensor, importance: Tensor | None) -> VectorGrid:
        """There is none: `has_grid`."""
        raise AssertionError(f"{self.label} codes weights one by one")

    def rounded(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Stored:
        """Fitted scales and nearest codes of weight (B, out, in), as `decode` takes them."""
        from quantkit.schemes.ggml.fit import encode

        grid = self.grid(weight, importance, points=points, signed=signed)
        return {"codes": encode(_BLOCK, weight, grid.params), "scale": _exponents(grid.params.d)}

    def tunable(self, stored: Stored) -> Tunable:
        """What gradients may change of stored matrices (B, out, in)."""
        from quantkit.schemes.tunable import TunableFloats

        return TunableFloats(stored["codes"], _powers(stored["scale"]), stored)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """codes (..., out, in) uint8, scale (..., out, groups) uint8 -> weight (..., out, in) float32."""
        return fp4.decoded(codes, _powers(scale))


@dataclass(frozen=True, slots=True)
class Mxfp4Grid(BlockGrid):
    """ggml's grid, stored in compressed-tensors' bytes."""

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """Codes (B, out, in) as they are stored, and the exponents of the scales."""
        return {"codes": fp4.stored_codes(codes), "scale": _exponents(scale)}


def _powers(scale: Tensor) -> Tensor:
    """Biased exponents uint8 -> powers of two, float32."""
    import torch

    power = scale.int() - _BIAS
    return torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)


def _exponents(d: Tensor) -> Tensor:
    """Powers of two for levels in halves -> biased exponents for levels in ones, uint8."""
    import torch

    _, exponent = torch.frexp(d)  # d = 0.5 * 2**exponent
    return (exponent + _BIAS).byte()
