"""The search of `quantkit.schemes.affine_int.fit` for sixteen rows at a time: same candidates, and the first of equals
wins.

Each division serves both signs of a scale. Sums are taken over 128 columns first, so that a group as long as a row
loses no accuracy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.numba.lanes import (
    ROWS,
    absolute,
    fma,
    inlined,
    kernel,
    least,
    load,
    most,
    part,
    rint,
    splat,
    store,
    where_less,
)
from quantkit.kernels.numba.threads import spread_over
from quantkit.kernels.numba.tile import Floats, fill

_SUMMED = 128


def search(
    weight: Tensor,
    importance: Tensor,
    fractions: Tensor,
    *,
    n_groups: int,
    bits: int,
    symmetric: bool,
    signed: bool,
) -> tuple[Tensor, Tensor | None]:
    """weight (B, out, in), importance (B, in), fractions (candidates,), all float32 -> scale (B, out, groups) float32,
    not rounded yet, and, if not symmetric, zero points, the same."""
    n_matrices, out_features, in_features = weight.shape
    values, h = weight.detach().contiguous().numpy(), importance.detach().contiguous().numpy()
    scale = np.empty((n_matrices, out_features, n_groups), np.float32)
    zero = np.empty(scale.shape if not symmetric else (n_matrices, 0, 0), np.float32)
    shares = fractions.numpy()
    tiles = -(-out_features // ROWS)

    def run(first: int, last: int) -> None:
        while first < last:
            b, start = divmod(first, tiles)
            stop = min(tiles, start + last - first)
            rows = start * ROWS, min(stop * ROWS, out_features)
            search_rows(values[b], h[b], rows, in_features // n_groups, shares, bits, signed, scale[b], zero[b])
            first += stop - start

    with spread_over(torch.get_num_threads()) as spread:
        spread(run, n_matrices * tiles)
    return torch.from_numpy(scale), None if symmetric else torch.from_numpy(zero)


@kernel
def search_rows(
    weight: Floats,
    h: Floats,
    rows: tuple[int, int],
    group: int,
    shares: Floats,
    bits: int,
    signed: bool,
    scale: Floats,
    zero: Floats,
) -> None:
    """weight (out, in), h (in,): fill rows[0] to rows[1] of scale (out, groups) and of zero, the same or (0, 0)."""
    tile, found = np.empty(group * ROWS, np.float32), np.empty(2 * ROWS, np.float32)
    for row in range(rows[0], rows[1], ROWS):
        for g in range(scale.shape[1]):
            fill(tile, weight[: rows[1]], row, g * group, group)
            group_h = h[g * group : (g + 1) * group]
            if zero.size == 0:
                _symmetric(tile, group_h, shares, bits, signed, found)
            else:
                _ranged(tile, group_h, shares, bits, found)
            for lane in range(min(ROWS, rows[1] - row)):
                scale[row + lane, g] = found[lane]
                if zero.size:
                    zero[row + lane, g] = found[ROWS + lane]


@part
def _symmetric(tile: Floats, h: Floats, shares: Floats, bits: int, signed: bool, found: Floats) -> None:
    """The best scale, to found[:16]."""
    largest = splat(0.0)
    for column in range(h.size):
        largest = most(largest, absolute(load(tile, column * ROWS)))
    largest = where_less(splat(0.0), largest, largest, splat(1.0))
    half = np.float32(2 ** (bits - 1))
    zero, top = splat(half), splat(half + half - np.float32(1.0))
    best, best_gain = splat(1.0), splat(-1.0)
    for share in range(shares.size):
        scale = (shares[share] * largest) / (half - np.float32(0.5))
        dot, norm, other_dot, other_norm = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        for start in range(0, h.size, _SUMMED):
            stop = min(start + _SUMMED, h.size)
            a, b, c, d = _sums_of_both(tile, h, start, stop, scale, zero, top)
            dot, norm, other_dot, other_norm = dot + a, norm + b, other_dot + c, other_norm + d
        best, best_gain = _better(dot, norm, scale, best, best_gain)
        if signed:
            best, best_gain = _better(other_dot, other_norm, 0.0 - scale, best, best_gain)
    store(found, 0, best)


@inlined
def _sums_of_both(
    tile: Floats, h: Floats, start: int, stop: int, scale: Any, zero: Any, top: Any
) -> tuple[Any, Any, Any, Any]:
    """sum h x level and sum h level^2 on the scale, and on its negative."""
    dot, norm, other_dot, other_norm = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    bottom = splat(0.0)
    for column in range(start, stop):
        x = load(tile, column * ROWS)
        weighted, ratio = h[column] * x, x / scale
        level = least(most(rint(zero + ratio), bottom), top) - zero
        other = least(most(rint(zero - ratio), bottom), top) - zero
        dot, norm = fma(weighted, level, dot), fma(splat(h[column]), level * level, norm)
        other_dot, other_norm = fma(weighted, other, other_dot), fma(splat(h[column]), other * other, other_norm)
    return dot, norm, other_dot, other_norm


@inlined
def _better(dot: Any, norm: Any, scale: Any, best: Any, best_gain: Any) -> tuple[Any, Any]:
    """The least-squares scale of these levels where it beats the best so far. Squared error = const - gain."""
    nothing = splat(0.0)
    gain = where_less(nothing, norm, dot * dot / norm, nothing)
    fitted = where_less(nothing, norm, dot / norm, scale)
    return where_less(best_gain, gain, fitted, best), where_less(best_gain, gain, gain, best_gain)


@part
def _ranged(tile: Floats, h: Floats, shares: Floats, bits: int, found: Floats) -> None:
    """The best scale to found[:16], the zero point, which all candidates share, to found[16:]."""
    low, high = splat(0.0), splat(0.0)
    for column in range(h.size):
        x = load(tile, column * ROWS)
        low, high = least(low, x), most(high, x)
    width = where_less(low, high, high - low, splat(1.0))
    top = splat(np.float32(2**bits - 1))
    zero = rint((0.0 - low) / width * top)
    best, best_gain = splat(1.0), splat(-1.0)
    for share in range(shares.size):
        scale = shares[share] * width / top
        dot, norm = splat(0.0), splat(0.0)
        for start in range(0, h.size, _SUMMED):
            a, b = _sums(tile, h, start, min(start + _SUMMED, h.size), scale, zero, top)
            dot, norm = dot + a, norm + b
        best, best_gain = _better(dot, norm, scale, best, best_gain)
    store(found, 0, best)
    store(found, ROWS, zero)


@inlined
def _sums(tile: Floats, h: Floats, start: int, stop: int, scale: Any, zero: Any, top: Any) -> tuple[Any, Any]:
    """sum h x level and sum h level^2."""
    dot, norm, bottom = splat(0.0), splat(0.0), splat(0.0)
    for column in range(start, stop):
        x = load(tile, column * ROWS)
        level = least(most(rint(x / scale + zero), bottom), top) - zero
        dot, norm = fma(h[column] * x, level, dot), fma(splat(h[column]), level * level, norm)
    return dot, norm
