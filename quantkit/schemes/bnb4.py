"""bitsandbytes' 4 bits: NF4 (quantiles of a normal distribution; QLoRA, arXiv 2305.14314) or FP4, in blocks.

    weight ~ level[code] * scale

With ``double_quant`` a scale is stored as a code of 8 bits too: nested_level[code] * nested_absmax + nested_offset. A
checkpoint brings its own nested levels, so here they are powers from 2**-10 to 1, 2.8 % apart, and 0; nested_absmax is
the largest |weight| of the matrix, the offset 0. Codes of weights are then chosen for the scale that will be served,
which bitsandbytes itself does not do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from quantkit.errors import SchemeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored, VectorGrid
    from quantkit.schemes.tunable import Tunable

LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip
"""What each code stands for; FP4 has two zeros."""
NESTED_RANGE = 10.0
"""log2 of the largest nested level over the smallest."""
_SHARES = (0.7, 1.0)
_GROUPS_AT_ONCE = 1 << 12


class Bnb4Scheme(BaseModel, frozen=True, extra="forbid"):
    """NF4 or FP4 of bitsandbytes."""

    kind: Literal["bnb4"] = "bnb4"
    type: Literal["nf4", "fp4"] = Field("nf4", description="The sixteen levels.")
    block_size: Literal[64, 128, 256, 512] = Field(64, description="Weights along in_features that share a scale.")
    double_quant: bool = Field(True, description="Scales are stored in 8 bits.")

    @property
    def has_grid(self) -> bool:
        """Whether single weights have levels of their own, so that a method can choose them one by one."""
        return True

    @property
    def shares_scale(self) -> bool:
        """Whether one number belongs to whole matrices: the nested scale of double quantisation."""
        return self.double_quant

    @property
    def fits_tables(self) -> bool:
        """Whether formats also store matrices that no calibration input reaches in it (vocabulary, MTP)."""
        return False

    @property
    def label(self) -> str:
        """ "NF4 g64 double", "FP4 g128"."""
        return f"{self.type.upper()} g{self.block_size}" + (" double" if self.double_quant else "")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless a tensor of this shape (out_features, in_features) is rows of whole blocks."""
        if len(shape) != 2:
            raise SchemeError(
                f"{name}: shape {list(shape)} is not a matrix.", hint="Add a rule that keeps this tensor."
            )
        if shape[1] % self.block_size:
            raise SchemeError(
                f"{name}: in_features {shape[1]} is not a multiple of block_size {self.block_size}.",
                hint="Use a block_size that divides it, or a rule that keeps this tensor.",
            )

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Bits per weight of codes and scales for a matrix (out_features, in_features)."""
        return 4 + (8 if self.double_quant else 32) / self.block_size

    def levels(self, device: torch.device) -> Tensor:
        """(16,) float32 by code."""
        import torch

        from quantkit.kernels.backend import constants

        return constants(LEVELS[self.type], torch.float32, device)

    def nested_levels(self, device: torch.device) -> Tensor:
        """(256,) float32, rising: 0, then powers up to 1."""
        import torch

        from quantkit.kernels.backend import constants

        powers = torch.exp2(torch.linspace(-NESTED_RANGE, 0, 255, dtype=torch.float64)).float()
        return constants((0.0, *powers.tolist()), torch.float32, device)

    def grid(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Bnb4Grid:
        """Fitted scales of weight (B, out, in) float32 under importance (B, in). ``points`` candidate ranges are tried
        in each block, 0 takes the whole range as bitsandbytes does. ``reach`` (B,): as in `Nvfp4Scheme.grid`. Raises
        `SchemeError` for values that are not finite."""
        reach = (weight.abs().amax((-2, -1)) if reach is None else reach).float()
        if not bool(reach.isfinite().all()):
            raise SchemeError("a weight is NaN or infinite.", hint="Repair the checkpoint, or keep this tensor.")
        wanted = _fit(self, weight, importance, points)
        grid = Bnb4Grid(self, wanted, reach[:, None, None])
        return Bnb4Grid(self, grid.storable(wanted), reach[:, None, None])

    def vector_grid(self, weight: Tensor, importance: Tensor | None) -> VectorGrid:
        """There is none: `has_grid`."""
        raise AssertionError(f"{self.label} codes weights one by one")

    def rounded(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Stored:
        """Fitted scales and nearest codes of weight (B, out, in), as `decode` takes them."""
        import torch

        grid = self.grid(weight, importance, points=points, signed=signed, reach=reach)
        divisor = grid.scale.masked_fill(grid.scale == 0, torch.inf).unsqueeze(-1)
        units = (weight.unflatten(-1, (-1, self.block_size)) / divisor).flatten(-2)
        return grid.stored(torch.bucketize(units, _middles(grid.table)), grid.scale, None)

    def tunable(self, stored: Stored) -> Tunable | None:
        """Nothing of stored matrices is tuned by gradients."""
        return None

    def decode(self, codes: Tensor, scale: Tensor, nested_absmax: Tensor | None = None) -> Tensor:
        """codes (..., out, in) uint8, scale (..., out, blocks) float32, or uint8 codes with nested_absmax (..., out, 1)
        float32, the same in all rows -> weight (..., out, in) float32."""
        if nested_absmax is not None:
            scale = self.nested_levels(scale.device)[scale.int()] * nested_absmax
        values = self.levels(codes.device)[codes.int()].view(*scale.shape, -1)
        return values.mul_(scale.unsqueeze(-1)).view(codes.shape)


@dataclass(frozen=True, slots=True)
class Bnb4Grid:
    """A `Grid`. scale (B, out, blocks) float32, reach (B, 1, 1): the nested scale of double quantisation."""

    scheme: Bnb4Scheme
    scale: Tensor
    reach: Tensor
    zero: float = 0.0
    offset: None = None

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """float32, None if scales are of the nested levels."""
        import torch

        return None if self.scheme.double_quant else torch.float32

    @property
    def top(self) -> int:
        """The highest place in `table`."""
        return len(set(LEVELS[self.scheme.type])) - 1

    @property
    def table(self) -> Tensor:
        """The different levels, rising."""
        import torch

        from quantkit.kernels.backend import constants

        return constants(tuple(sorted(set(LEVELS[self.scheme.type]))), torch.float32, self.scale.device)

    def storable(self, wanted: Tensor) -> Tensor:
        """The nearest scales (B, out, ...) that can be stored, never negative."""
        if not self.scheme.double_quant:
            return wanted.clamp(min=0)
        reach = self.reach.view(-1, *[1] * (wanted.ndim - 1))
        return self.scheme.nested_levels(wanted.device)[self._nested_codes(wanted, reach)] * reach

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        """See `storable`; the block does not matter."""
        return self.storable(wanted)

    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor:
        """There are no offsets."""
        raise AssertionError("blocks of bitsandbytes have no offsets")

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """Codes as bitsandbytes counts them, and scales or their codes with the nested scale once for each row."""
        import torch

        levels = LEVELS[self.scheme.type]
        own = torch.tensor([levels.index(level) for level in sorted(set(levels))], dtype=torch.uint8)
        codes = own.to(codes.device)[codes.int()]
        if not self.scheme.double_quant:
            return {"codes": codes, "scale": scale}
        nested = self.reach.expand(*scale.shape[:-1], 1).contiguous()
        return {"codes": codes, "scale": self._nested_codes(scale, self.reach).byte(), "nested_absmax": nested}

    def _nested_codes(self, scale: Tensor, reach: Tensor) -> Tensor:
        import torch

        middles = _middles(self.scheme.nested_levels(scale.device))
        return torch.bucketize(scale / reach.masked_fill(reach == 0, torch.inf), middles)


def _middles(rising: Tensor) -> Tensor:
    return (rising[1:] + rising[:-1]) / 2


def _fit(scheme: Bnb4Scheme, weight: Tensor, importance: Tensor | None, points: int) -> Tensor:
    """(B, out, blocks) float32: for each candidate range the codes, and for these the least-squares scale."""
    import torch

    grouped = weight.unflatten(-1, (-1, scheme.block_size))
    largest = grouped.abs().amax(-1)
    if points == 0:
        return largest
    shares = torch.ones_like(weight[:, 0]) if importance is None else importance
    weighting = shares.unflatten(-1, (-1, scheme.block_size)).unsqueeze(1).expand(grouped.shape)
    found = torch.empty_like(largest)
    rows = max(1, _GROUPS_AT_ONCE // largest.shape[-1])
    for matrix in range(len(weight)):
        for first in range(0, weight.shape[1], rows):
            part = matrix, slice(first, first + rows)
            found[part] = _search(scheme, grouped[part], weighting[part], largest[part], points)
    return found


def _search(scheme: Bnb4Scheme, grouped: Tensor, weighting: Tensor, largest: Tensor, points: int) -> Tensor:
    """grouped, weighting (n, blocks, block), largest (n, blocks) -> the scale of the least weighted squared error."""
    import torch

    levels = scheme.levels(grouped.device).unique()
    middles, weighted = _middles(levels), grouped * weighting
    best, gain = largest, torch.full_like(largest, -1.0)
    for share in torch.linspace(*_SHARES, points).tolist():
        scale = largest * share
        divisor = scale.masked_fill(scale == 0, torch.inf).unsqueeze(-1)
        values = levels[torch.bucketize(grouped / divisor, middles)]
        dot, norm = (weighted * values).sum(-1), (values.square() * weighting).sum(-1)
        own = torch.where(norm > 0, dot * dot / norm, 0.0)  # squared error with the best scale = const - gain
        best = torch.where((own > gain) & (norm > 0), dot / norm, best)
        gain = torch.maximum(own, gain)
    return best
