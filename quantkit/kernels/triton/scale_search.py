# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""The search for the scales of an integer grid on a GPU: all candidates of a group at once, in registers.

The rule and its order of candidates are those of `quantkit.schemes.affine_int.fit`. Weights come transposed, so that a
warp reads one input of neighbouring rows: nothing has to be summed across threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from quantkit.kernels.triton.transpose import transposed

_AT_ONCE = 8  # candidates in registers
_ROWS = 128
_WARPS = 4


@triton.jit
def _nearest_integer(values):
    return (values + 12582912.0) - 12582912.0  # 1.5 * 2**23: what stays is rounded, ties to even


@triton.jit
def _gain(dot, norm):
    return tl.where(norm > 0, dot * dot / tl.where(norm > 0, norm, 1.0), 0.0)


@triton.jit
def _scale(dot, norm, tried):
    return tl.where(norm > 0, dot / tl.where(norm > 0, norm, 1.0), tried)


@triton.jit
def _search(
    weight, importance, fractions, scale, zero, in_features, out_features, n_groups, size, top, points,
    SYMMETRIC: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """weight (B, in, out), importance (B, in), fractions (points,) -> scale, zero (B, groups, out)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    group = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    weight += (matrix * in_features + group * size) * out_features + rows
    importance += matrix * in_features + group * size
    at = (matrix * n_groups + group) * out_features + rows

    low = tl.zeros([ROWS], tl.float32)
    high = tl.zeros([ROWS], tl.float32)
    for k in range(size):
        values = tl.load(weight + k * out_features, mask=inside, other=0.0)
        low, high = tl.minimum(low, values), tl.maximum(high, values)
    if SYMMETRIC:
        half = (top + 1) / 2
        extent = tl.maximum(high, -low)
        extent, steps = tl.where(extent > 0, extent, 1.0), half - 0.5
        middle = tl.zeros([ROWS], tl.float32) + half
    else:
        half = 0.0
        extent, steps = tl.where(high > low, high - low, 1.0), top
        middle = _nearest_integer(-low / extent * top)
    best_gain = tl.full([ROWS], -1.0, tl.float32)
    best = tl.full([ROWS], 1.0, tl.float32)
    number = tl.arange(0, AT_ONCE)
    for first in range(0, points, AT_ONCE):
        fraction = tl.load(fractions + first + number, mask=first + number < points, other=1.0)
        tried = fraction[:, None] * extent[None, :] / steps
        per_step = 1.0 / tried
        dot = tl.zeros([AT_ONCE, ROWS], tl.float32)
        norm = tl.zeros([AT_ONCE, ROWS], tl.float32)
        if SIGNED:
            other_dot = tl.zeros([AT_ONCE, ROWS], tl.float32)
            other_norm = tl.zeros([AT_ONCE, ROWS], tl.float32)
        for k in range(size):
            values = tl.load(weight + k * out_features, mask=inside, other=0.0)
            counts = tl.load(importance + k)
            weighted = (values * counts)[None, :]
            if SYMMETRIC:
                levels = _nearest_integer(values[None, :] * per_step)
                if SIGNED:  # a negative scale has its extra level on the other side
                    others = tl.minimum(tl.maximum(levels, 1.0 - half), half)
                    other_dot += weighted * others
                    other_norm += others * others * counts
                levels = tl.minimum(tl.maximum(levels, -half), half - 1.0)
            else:
                levels = tl.minimum(tl.maximum(values[None, :] * per_step + middle[None, :], 0.0), top)
                levels = _nearest_integer(levels) - middle[None, :]
            dot += weighted * levels
            norm += levels * levels * counts
        gain, found = _gain(dot, norm), _scale(dot, norm, tried)
        if SIGNED:
            other_gain = _gain(other_dot, other_norm)
            better = other_gain > gain
            gain = tl.where(better, other_gain, gain)
            found = tl.where(better, -_scale(other_dot, other_norm, tried), found)
        gain = tl.where((first + number < points)[:, None], gain, -2.0)
        gain, chosen = tl.max(gain, axis=0, return_indices=True, return_indices_tie_break_left=True)
        found = tl.sum(tl.where(number[:, None] == chosen[None, :], found, 0.0), axis=0)
        best = tl.where(gain > best_gain, found, best)
        best_gain = tl.maximum(gain, best_gain)
    tl.store(scale + at, best, mask=inside)
    if not SYMMETRIC:
        tl.store(zero + at, middle, mask=inside)


def search(
    weight: Tensor, importance: Tensor, fractions: Tensor, *, n_groups: int, bits: int, symmetric: bool, signed: bool
) -> tuple[Tensor, Tensor | None]:
    """weight (B, out, in) float32, importance (B, in) float32, fractions (points,) float32, rising, of the range ->
    scale and, if asymmetric, zero point (B, out, groups) float32, not yet rounded to what can be stored."""
    n_matrices, out_features, in_features = weight.shape
    scale = weight.new_empty(n_matrices, n_groups, out_features)
    zero = scale if symmetric else torch.empty_like(scale)
    with device_of(weight):
        _search[(triton.cdiv(out_features, _ROWS), n_groups, n_matrices)](
            transposed(weight), importance.contiguous(), fractions, scale, zero,
            in_features, out_features, n_groups, in_features // n_groups, float(2**bits - 1), len(fractions),
            SYMMETRIC=symmetric, SIGNED=symmetric and signed, ROWS=_ROWS, AT_ONCE=_AT_ONCE, num_warps=_WARPS,
        )  # fmt: skip
    return transposed(scale), None if symmetric else transposed(zero)
