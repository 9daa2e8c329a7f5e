"""NVFP4: FP4 in groups of 16 with an FP8 (e4m3) scale each, and one float32 number for the whole matrix.

    weight ~ level[code] * (scale / global_scale)

The global scale is a divisor: it brings the largest weight to the top of e4m3 and e2m1, 448 * 6. Matrices that a
runtime joins (gate and up, q_a and kv_a) must have the same one, so methods are told how far all of them reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from quantkit.errors import SchemeError
from quantkit.schemes import fp4

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored, VectorGrid
    from quantkit.schemes.tunable import Tunable

GROUP = 16
FLOAT8_MAX = 448.0
_TOP_CODE = 126
"""e4m3's code of 448; 127 is NaN. Codes of positive values rise with them, 0 is no scale."""
_STEPS = range(-3, 8)
"""Neighbours of the scale that brings a group's largest weight to 6, in steps of e4m3 (1/8 to 1/16 each): down to
where that weight is cut by a quarter, and up past the scale that brings it to 4. Wider ones are never chosen for
normal weights, nor for those of heavy tails."""
_GROUPS_AT_ONCE = 1 << 14  # the working set of the search stays in a processor's cache
_GROUPS_AT_ONCE_ON_GPU = 1 << 22


class Nvfp4Scheme(BaseModel, frozen=True, extra="forbid"):
    """FP4 in groups of 16 with FP8 scales, as NVIDIA's Blackwell computes with it."""

    kind: Literal["nvfp4"] = "nvfp4"

    @property
    def group_size(self) -> int:
        """Weights along in_features that share an FP8 scale."""
        return GROUP

    @property
    def has_grid(self) -> bool:
        """Whether single weights have levels of their own, so that a method can choose them one by one."""
        return True

    @property
    def shares_scale(self) -> bool:
        """Whether one number belongs to whole matrices, and to those that runtimes join with them."""
        return True

    @property
    def fits_tables(self) -> bool:
        """Whether formats also store matrices that no calibration input reaches in it (vocabulary, MTP)."""
        return False

    @property
    def label(self) -> str:
        """What tables and messages call it."""
        return "NVFP4"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless a tensor of this shape (out_features, in_features) is whole groups."""
        fp4.check_groups(name, shape, self.label, GROUP)

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Bits per weight of codes and scales for a matrix (out_features, in_features)."""
        return 4 + 8 / GROUP + 32 / (shape[0] * shape[1])

    def grid(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Nvfp4Grid:
        """Fitted scales of weight (B, out, in) float32 under importance (B, in). ``points`` 0: the scale that brings
        the group's largest weight to 6, else the best of its neighbours. ``reach`` (B,) float32: the largest |weight|
        of all that shares the global scale, None: of this weight. Raises `SchemeError` for values that are not finite.
        """
        global_scale = _global_scale(weight, reach)
        return Nvfp4Grid(_fit(weight, importance, global_scale, search=points > 0), global_scale)

    def vector_grid(self, weight: Tensor, importance: Tensor | None) -> VectorGrid:
        """There is none: `has_grid`."""
        raise AssertionError(f"{self.label} codes weights one by one")

    def rounded(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Stored:
        """Fitted scales and nearest codes of weight (B, out, in), as `decode` takes them."""
        grid = self.grid(weight, importance, points=points, signed=signed, reach=reach)
        units = (weight.unflatten(-1, (-1, GROUP)) / grid.scale.unsqueeze(-1)).flatten(-2)
        return grid.stored(fp4.nearest(units, grid.table), grid.scale, None)

    def tunable(self, stored: Stored) -> Tunable:
        """What gradients may change of stored matrices (B, out, in)."""
        from quantkit.schemes.tunable import TunableFloats

        return TunableFloats(stored["codes"], stored["scale"].float() / stored["global_scale"], stored)

    def decode(self, codes: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
        """codes (..., out, in) uint8, scale (..., out, groups) float8_e4m3fn, global_scale (..., out, 1) float32, the
        same in all rows -> weight (..., out, in) float32, in the order of compressed-tensors' operations."""
        return fp4.decoded(codes, scale.float() / global_scale)


@dataclass(frozen=True, slots=True)
class Nvfp4Grid:
    """A `Grid`. float8_scale (B, out, groups) float8_e4m3fn, positive; global_scale (B, 1, 1) float32."""

    float8_scale: Tensor
    global_scale: Tensor
    scale_dtype: None = None
    zero: float = 0.0
    offset: None = None
    top: int = 14

    @property
    def scale(self) -> Tensor:
        """(B, out, groups) float32."""
        return self.float8_scale.float() / self.global_scale

    @property
    def table(self) -> Tensor:
        """The levels of FP4."""
        return fp4.table(self.float8_scale.device)

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        """A positive e4m3 value over the global scale; the group does not matter."""
        return _to_float8(wanted * self.global_scale[..., 0]).float() / self.global_scale[..., 0]

    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor:
        """There are no offsets."""
        raise AssertionError("NVFP4 has no offsets")

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """Codes as they are stored, and both scales, the global one once for each row."""
        float8 = _to_float8(scale * self.global_scale)
        rows = self.global_scale.expand(*scale.shape[:-1], 1).contiguous()
        return {"codes": fp4.stored_codes(codes), "scale": float8, "global_scale": rows}


def _to_float8(values: Tensor) -> Tensor:
    """The nearest positive e4m3 value."""
    import torch

    return values.clamp(2.0**-9, FLOAT8_MAX).to(torch.float8_e4m3fn)


def _global_scale(weight: Tensor, reach: Tensor | None) -> Tensor:
    """(B, 1, 1) float32."""
    if reach is None:
        reach = weight.abs().amax((-2, -1))
    if not bool(reach.isfinite().all()):
        raise SchemeError("a weight is NaN or infinite.", hint="Repair the checkpoint, or keep this tensor.")
    # Of zeros alone any number will do.
    wanted = FLOAT8_MAX * fp4.LARGEST / reach.float().masked_fill(reach == 0, FLOAT8_MAX * fp4.LARGEST)
    return wanted.clamp(max=2.0**100)[:, None, None]


def _fit(weight: Tensor, importance: Tensor | None, global_scale: Tensor, *, search: bool) -> Tensor:
    """(B, out, groups) float8_e4m3fn."""
    import torch

    from quantkit.kernels.backend import Backend, backend_of

    grouped = weight.unflatten(-1, (-1, GROUP))
    start = _to_float8(grouped.abs().amax(-1) / fp4.LARGEST * global_scale)
    if not search:
        return start
    shares = torch.ones_like(weight[:, 0]) if importance is None else importance
    if backend_of(weight) is Backend.NUMBA:
        from quantkit.kernels.numba import fp4 as fp4_numba

        values = torch.arange(_TOP_CODE + 1, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        scales = values / global_scale[:, :, 0]
        codes = fp4_numba.search(weight, shares, start.view(torch.uint8), scales, (_STEPS.start, _STEPS.stop))
        return codes.view(torch.float8_e4m3fn)
    return fit_in_torch(weight, shares, start, global_scale)


def fit_in_torch(weight: Tensor, shares: Tensor, start: Tensor, global_scale: Tensor) -> Tensor:
    """The search on the weight's own device. weight (B, out, in), shares (B, in), start (B, out, groups) float8_e4m3fn,
    global_scale (B, 1, 1) -> scales like ``start``. On a processor it is slow: there the tests compare the compiled one
    with it."""
    import torch

    grouped = weight.unflatten(-1, (-1, GROUP))
    weighting = shares.unflatten(-1, (-1, GROUP)).unsqueeze(1).expand(grouped.shape)
    divisors = global_scale.expand(start.shape)
    best = torch.empty(start.shape, dtype=torch.uint8, device=weight.device)
    step = _GROUPS_AT_ONCE_ON_GPU if weight.is_cuda else _GROUPS_AT_ONCE
    rows = max(1, step // start.shape[-1])
    for matrix in range(len(weight)):
        for first in range(0, weight.shape[1], rows):
            part = matrix, slice(first, first + rows)
            best[part] = _search(grouped[part], weighting[part], start[part].view(torch.uint8), divisors[part])
    return best.view(torch.float8_e4m3fn)


def _search(grouped: Tensor, weighting: Tensor, start: Tensor, divisors: Tensor) -> Tensor:
    """grouped, weighting (n, groups, 16), start (n, groups) codes of e4m3 -> the code of the least weighted squared
    error near it."""
    import torch

    least, best = torch.full(start.shape, torch.inf, device=start.device), start
    for step in _STEPS:
        code = (start.int() + step).clamp_(1, _TOP_CODE).byte()
        scale = (code.view(torch.float8_e4m3fn).float() / divisors).unsqueeze(-1)
        error = fp4.rounded(grouped / scale).mul_(scale).sub_(grouped).square_().mul_(weighting).sum(-1)
        best = torch.where(error < least, code, best)
        least = torch.minimum(error, least)
    return best
