"""Integers of 2 to 8 bits with one scale (and, if asymmetric, one zero point) for each group along in_features.

    weight ~ (codes - zero_point) * scale          codes, zero_point in [0, 2**bits - 1]

Symmetric is the same rule with the fixed zero point ``2**(bits - 1)``. A symmetric scale may be *negative*: the lone
extra level
-2**(bits - 1) then lies on the positive side, where the largest weight of the group may need it.

torch is imported inside the functions: a plan needs the schemes but must start without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, field_validator

from quantkit.errors import SchemeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored, VectorGrid
    from quantkit.schemes.tunable import Tunable

ScaleDtype = Literal["bfloat16", "float16", "float32"]


class IntScheme(BaseModel, frozen=True, extra="forbid"):
    """Uniform integer grid. Sizes are exact: ``bpw`` counts codes, scales and zero points, not a format's padding."""

    kind: Literal["int"] = "int"
    bits: int = Field(4, ge=2, le=8, description="Bits of one code, 2 to 8.")
    group_size: int | None = Field(
        128,
        ge=8,
        description="Weights along in_features that share a scale; null or -1: one scale a row.",
        json_schema_extra={"anyOf": [{"minimum": 8, "type": "integer"}, {"enum": [-1]}, {"type": "null"}]},
    )
    symmetric: bool = Field(True, description="No zero point is stored; the grid is centred on code 2**(bits-1).")
    scale_dtype: ScaleDtype = Field(
        "bfloat16", description="Dtype of the stored scales: the dtype that will be served."
    )

    @field_validator("group_size", mode="before")
    @classmethod
    def _whole_row(cls, value: object) -> object:
        return None if value == -1 else value

    @property
    def has_grid(self) -> bool:
        """Whether single weights have levels of their own, so that a method can choose them one by one."""
        return True

    @property
    def fits_tables(self) -> bool:
        """Whether formats also store matrices that no calibration input reaches in it (vocabulary, MTP)."""
        return False

    @property
    def shares_scale(self) -> bool:
        """Whether one number belongs to whole matrices, and to those that runtimes join with them."""
        return False

    @property
    def label(self) -> str:
        """ "int4 g128", "int8 channel asymmetric"."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group}" + ("" if self.symmetric else " asymmetric")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless a tensor of this shape (out_features, in_features) fits the grid."""
        if len(shape) != 2:
            raise SchemeError(
                f"{name}: shape {list(shape)} is not a matrix.", hint="Add a rule that keeps this tensor."
            )
        if self.group_size is not None and shape[1] % self.group_size:
            raise SchemeError(
                f"{name}: in_features {shape[1]} is not a multiple of group_size {self.group_size}.",
                hint="Use a group_size that divides it, null (one scale a row), or a rule that keeps this tensor.",
            )

    def n_groups(self, in_features: int) -> int:
        """Number of groups in one row."""
        return 1 if self.group_size is None else in_features // self.group_size

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Bits per weight of codes, scales and zero points for a matrix (out_features, in_features)."""
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + self.n_groups(shape[1]) * (scale_bits + zero_bits) / shape[1]

    def fit(self, weight: Tensor, importance: Tensor | None = None, *, grid: int = 40, signed: bool = True) -> Params:
        """Scale and zero point of each group. See `fit`."""
        return fit(self, weight, importance, grid=grid, signed=signed)

    def grid(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> IntGrid:
        """Fitted scales of weight (B, out, in) float32 under importance (B, in). ``points``, ``signed``: as ``grid``
        and ``signed`` of `fit`."""
        return IntGrid(self, *self.fit(weight, importance, grid=points, signed=signed))

    def vector_grid(self, weight: Tensor, importance: Tensor | None) -> VectorGrid:
        """There is none: `has_grid`."""
        raise AssertionError(f"{self.label} codes weights one by one")

    def rounded(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Stored:
        """Fitted scales and nearest codes of weight (B, out, in), as `decode` takes them."""
        scale, zero_point = self.fit(weight, importance, grid=points, signed=signed)
        return _stored(self.encode(weight, scale, zero_point), scale, zero_point)

    def tunable(self, stored: Stored) -> Tunable:
        """What gradients may change of stored matrices (B, out, in)."""
        from quantkit.schemes.tunable import TunableIntegers

        return TunableIntegers(
            self.bits, stored["codes"], stored["scale"], stored.get("zero_point"), partial(representable, self)
        )

    def encode(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Nearest code, ties to even. weight (..., out, in) float32, scale (..., out, groups) -> (..., out, in)
        uint8."""
        grouped = _grouped(weight, scale.shape[-1])
        codes = grouped / scale.float().unsqueeze(-1) + self._zero(zero_point)
        return codes.round_().clamp_(0, 2**self.bits - 1).byte().view(weight.shape)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """codes (..., out, in) uint8, scale (..., out, groups) -> weight (..., out, in) float32."""
        from quantkit.kernels.backend import Backend

        if Backend.of(codes.device) is Backend.TRITON:
            from quantkit.kernels.triton import decode as decode_triton

            return decode_triton.decode(codes, scale, 2.0 ** (self.bits - 1) if zero_point is None else zero_point)
        grouped = _grouped(codes.float(), scale.shape[-1])
        return ((grouped - self._zero(zero_point)) * scale.float().unsqueeze(-1)).view(codes.shape)

    @property
    def takes_row_gains(self) -> bool:
        """See `quantkit.quantizers.row_gains`: scales are floats of each row."""
        return True

    def with_row_gains(self, stored: Stored, gains: Tensor) -> Stored:
        """What is stored, scales times gains (..., out) float32, rounded to their dtype."""
        scale = stored["scale"]
        return {**stored, "scale": (scale.float() * gains.unsqueeze(-1)).to(scale.dtype)}

    def _zero(self, zero_point: Tensor | None) -> Tensor | float:
        return float(2 ** (self.bits - 1)) if zero_point is None else zero_point.float().unsqueeze(-1)


def _stored(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Stored:
    stored = {"codes": codes, "scale": scale}
    return stored if zero_point is None else {**stored, "zero_point": zero_point}


@dataclass(frozen=True, slots=True)
class IntGrid:
    """A `Grid`: scale (B, out, groups) in the dtype that is stored, zero_point the same in uint8 or None."""

    scheme: IntScheme
    stored_scale: Tensor
    zero_point: Tensor | None
    offset: None = None
    table: None = None

    @property
    def scale(self) -> Tensor:
        """(B, out, groups) float32."""
        return self.stored_scale.float()

    @property
    def scale_dtype(self) -> torch.dtype:
        """See `Grid.scale_dtype`."""
        return self.stored_scale.dtype

    @property
    def zero(self) -> Tensor | float:
        """Half of the codes, or the zero points in float32."""
        return 2.0 ** (self.scheme.bits - 1) if self.zero_point is None else self.zero_point.float()

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.scheme.bits - 1

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        """``wanted`` in the dtype that is stored; the group does not matter."""
        return representable(self.scheme, wanted)

    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor:
        """There are no offsets."""
        raise AssertionError("an integer grid has zero points, no offsets")

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """Codes, scales in the stored dtype and, if asymmetric, zero points."""
        return _stored(codes, scale.to(self.stored_scale.dtype), self.zero_point)


Params = tuple["Tensor", "Tensor | None"]
"""scale (..., out, groups) in the scheme's scale_dtype and, if asymmetric, zero_point (..., out, groups) uint8."""


def fit(scheme: IntScheme, weight: Tensor, importance: Tensor | None, *, grid: int, signed: bool) -> Params:
    """Search scale (and zero point) of each group for the least importance-weighted squared error.

    ``grid`` candidate ranges are tried, from a fraction of the group's range up to the whole of it. Each gives codes,
    and those codes the least-squares scale (the idea of ggml's make_qx_quants); with ``signed`` symmetric grids are
    tried in both orientations. ``grid=0`` takes the whole range, which is plain round to nearest with
    compressed-tensors' own scale.
    Scales come back rounded to ``scale_dtype``, so that codes are chosen for the scale that will be served.

    weight (..., out, in) float32; importance (..., in) float32, the mean square of each input, or None for equal
    weights. Raises `SchemeError` for a weight that no float16 scale reaches.
    """
    import torch

    if scheme.scale_dtype == "float16":
        _check_reach(scheme, weight)
    n_groups = scheme.n_groups(weight.shape[-1])
    if importance is None:
        importance = torch.ones(weight.shape[-1], device=weight.device)
    if grid and (search := _kernel(weight, importance)) is not None:
        return _fit_by_kernel(search, scheme, weight, importance, grid, signed)
    grouped = _grouped(weight, n_groups)  # (..., out, groups, group)
    weighting = _grouped(importance, n_groups).unsqueeze(-3).expand(grouped.shape)  # the same for every row
    flat, flat_weighting = grouped.reshape(-1, grouped.shape[-1]), weighting.reshape(-1, grouped.shape[-1])
    scale, zero = torch.empty_like(flat[:, 0]), torch.zeros_like(flat[:, 0])
    for start in range(0, len(flat), _FIT_GROUPS):
        part = slice(start, start + _FIT_GROUPS)
        scale[part], zero[part] = _fit_groups(scheme, flat[part], flat_weighting[part], grid, signed)
    scale = representable(scheme, scale).view(grouped.shape[:-1]).to(_scale_dtype(scheme))
    if scheme.symmetric:
        return scale, None
    return scale, zero.view(grouped.shape[:-1]).to(torch.uint8)


def _check_reach(scheme: IntScheme, weight: Tensor) -> None:
    """Larger weights than the highest code times the largest float16 would be cut to that without a word."""
    import torch

    if not weight.numel():
        return
    lowest, highest = torch.aminmax(weight, dim=-1)
    codes = 2 ** (scheme.bits - 1) if scheme.symmetric else 2**scheme.bits - 1
    span = torch.maximum(-lowest, highest) if scheme.symmetric else highest.clamp(min=0) - lowest.clamp(max=0)
    limit = codes * torch.finfo(torch.float16).max
    wrong = ~(span <= limit)  # NaN is wrong, too
    if bool(wrong.any()):
        row = tuple(wrong.nonzero()[0].tolist())
        raise SchemeError(
            f"row {row[-1]}: no float16 scale of {scheme.label} fits its weights, which reach from "
            f"{float(lowest[row]):g} to {float(highest[row]):g} (needed: at most {limit:g}).",
            hint="Repair the checkpoint, take scale_dtype: bfloat16, or keep this tensor.",
        )


def _kernel(weight: Tensor, importance: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The compiled search for where these tensors are, or None: torch does it."""
    from quantkit.kernels.backend import Backend, backend_of

    backend = backend_of(weight)
    if backend is Backend.TRITON:
        from quantkit.kernels.triton import scale_search as scale_search_triton

        return scale_search_triton.search
    if backend is Backend.NUMBA and backend_of(importance) is Backend.NUMBA:
        from quantkit.kernels.numba import scale_search as scale_search_numba

        return scale_search_numba.search
    return None


def _fit_by_kernel(
    search: Callable[..., tuple[Tensor, Tensor | None]],
    scheme: IntScheme,
    weight: Tensor,
    importance: Tensor,
    grid: int,
    signed: bool,
) -> Params:
    import torch

    out_features, in_features = weight.shape[-2:]
    flat = weight.reshape(-1, out_features, in_features)
    counts = importance.expand(*weight.shape[:-2], in_features).reshape(-1, in_features)
    fractions = torch.linspace(_SMALLEST_RANGE[min(scheme.bits, 5)], 1.0, grid).to(weight.device, non_blocking=True)
    n_groups = scheme.n_groups(in_features)
    scale, zero = search(
        flat, counts, fractions, n_groups=n_groups, bits=scheme.bits, symmetric=scheme.symmetric, signed=signed
    )
    shape = *weight.shape[:-1], n_groups
    scale = representable(scheme, scale).view(shape).to(_scale_dtype(scheme))
    return scale, None if zero is None else zero.view(shape).to(torch.uint8)


_FIT_GROUPS = 2048  # groups searched at once: the working set of the search stays in the processor's cache


def representable(scheme: IntScheme, scale: Tensor) -> Tensor:
    """Round scales (float32) to the scheme's scale_dtype, back in float32. Zero and non-finite become the nearest
    usable scale.

    A scale that underflows to zero would divide by zero: such a group's weights are smaller than any step, so 1 encodes
    them as 0.
    """
    import torch

    dtype = _scale_dtype(scheme)
    limit = torch.finfo(dtype).max
    rounded = scale.clamp(-limit, limit).to(dtype).float()
    return torch.where((rounded == 0) | rounded.isnan(), torch.ones_like(rounded), rounded)


def _fit_groups(
    scheme: IntScheme, weight: Tensor, importance: Tensor, grid: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """weight, importance (n, group) -> best scale, zero point, each (n,) float32."""
    import torch

    top = 2**scheme.bits - 1
    candidates = _candidates(scheme, weight, grid, signed)
    if grid == 0:
        return candidates[0]
    weighted = weight * importance
    best_gain = torch.full_like(weight[:, 0], -1.0)
    best_scale, best_zero = torch.ones_like(best_gain), torch.zeros_like(best_gain)
    for scale, zero in candidates:
        levels = (weight / scale[:, None]).add_(zero[:, None]).round_().clamp_(0, top).sub_(zero[:, None])
        dot = (weighted * levels).sum(-1)
        norm = levels.square_().mul_(importance).sum(-1)
        gain = torch.where(norm > 0, dot * dot / norm, 0.0)  # squared error with the best scale = const - gain
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, torch.where(norm > 0, dot / norm, scale), best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _candidates(scheme: IntScheme, weight: Tensor, grid: int, signed: bool) -> list[tuple[Tensor, Tensor]]:
    """Ranges to try, each as (scale, zero point) of shape (n,) float32."""
    import torch

    fractions = [1.0] if grid == 0 else torch.linspace(_SMALLEST_RANGE[min(scheme.bits, 5)], 1.0, grid).tolist()
    if scheme.symmetric:
        half = 2.0 ** (scheme.bits - 1)
        largest = weight.abs().amax(-1)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        zero = torch.full_like(largest, half)
        # Up to the whole range for the shorter side; the sign of the scale says which side has the extra level.
        signs = (1.0, -1.0) if signed and grid else (1.0,)
        return [(sign * fraction * largest / (half - 0.5), zero) for fraction in fractions for sign in signs]
    top = 2.0**scheme.bits - 1
    low, high = weight.amin(-1).clamp_(max=0), weight.amax(-1).clamp_(min=0)
    width = torch.where(high > low, high - low, torch.ones_like(high))
    scales = [fraction * width / top for fraction in fractions]
    return [(scale, (-low / width * top).round_()) for scale in scales]


# The smallest fraction of the range worth trying, by bits (5 stands for 5 and more): few levels gain most from
# clipping.
_SMALLEST_RANGE = {2: 0.3, 3: 0.45, 4: 0.6, 5: 0.8}


def _grouped(tensor: Tensor, n_groups: int) -> Tensor:
    """(..., in) -> (..., groups, group)."""
    return tensor.reshape(*tensor.shape[:-1], n_groups, -1)


def _scale_dtype(scheme: IntScheme) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
    return dtype
