# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Groups of weights on a GPU, one to a thread: the sums A to F of `quantkit.schemes.ggml.measure` in registers.

A tensor of N lanes holds one number of N groups; the weights of the groups are tuples of such tensors, one for each
place in a group. So Triton gives every thread a whole group, nothing is summed across threads but what belongs to a
block of several groups, and the loops over candidates touch no memory. `measure` and `measure_pair` are most of the
time: 11 and 14 instructions for a weight.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from quantkit.kernels.ggml_constants import HALF_MAX, HALF_TINY

SIZES = ("n_groups", "row_groups", "n_rows")
"""Parameters of the searches for whose values Triton shouldn't compile anew: that takes seconds."""
_HALF_MAX = tl.constexpr(HALF_MAX)
_HALF_TINY = tl.constexpr(HALF_TINY)
_ROUNDS = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away again, it leaves the nearest integer, ties to even, of any number below 2**22."""
_FAR = tl.constexpr(2.0**21)
_TABLE_ROUNDS = tl.constexpr(1.5 * 2.0**22)
"""The same for multiples of 1/2; the lowest bits of the sum count them."""
_TABLE_BITS = tl.constexpr(0x4AC00000 - 256)
"""The bits of -128 + _TABLE_ROUNDS."""
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_groups(values, first, inside, K: tl.constexpr, N: tl.constexpr):
    """values at first + 0..K - 1 of each lane, a tuple of K tensors; zeros where not inside."""
    found = ()
    four = tl.arange(0, 4)
    for k in tl.static_range(0, K, 4):
        quad = tl.load(values + first[:, None] + (k + four)[None, :], mask=inside[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(quad, [N, 2, 2]))
        x_0, x_2 = tl.split(even)
        x_1, x_3 = tl.split(odd)
        found = found + (x_0, x_1, x_2, x_3)
    return found


@triton.jit
def ratio(numerator, denominator):
    """numerator / denominator, 0 unless the denominator is positive."""
    return tl.where(denominator > 0, numerator / denominator, 0.0)


@triton.jit
def inverse(scale):
    """1 / scale, 0 where that would be infinite."""
    return tl.where(tl.abs(scale) > 1e-37, 1.0 / scale, 0.0)


@triton.jit
def half(value):
    """The nearest float16."""
    return tl.minimum(tl.maximum(value, -_HALF_MAX), _HALF_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def nonzero_half(value):
    """The nearest float16, or the smallest one with the sign of the value."""
    rounded = half(value)
    return tl.where(rounded == 0, tl.where(value < 0, -_HALF_TINY, _HALF_TINY), rounded)


@triton.jit
def integer(value, low, high):
    """The nearest integer from low to high."""
    return (tl.minimum(tl.maximum(value, low), high) + _ROUNDS) - _ROUNDS


@triton.jit
def far_integer(value):
    """The nearest integer; far beyond all limits of integers that are stored, just something as far."""
    return integer(value, -_FAR, _FAR)


@triton.jit
def level_of(value, table, LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr):
    """The nearest level to value. Levels that are no integers in a row (TABLE) lie between -127 and 127, and the points
    between them at multiples of 1/2: table has the level of each half step from -128 on, plus 128, in bytes."""
    if TABLE:
        value = tl.minimum(tl.maximum(value, LOW - 1.0), HIGH + 1.0)
        place = ((value + 0.25) + _TABLE_ROUNDS).to(tl.int32, bitcast=True) - _TABLE_BITS
        if _INTERPRETED:
            level = tl.load(table + place).to(tl.float32) - 128.0
        else:  # For each load, Triton compares the order of all others: as assembly, hundreds compile in no time.
            level = tl.inline_asm_elementwise(
                "{ .reg .b32 byte; ld.global.nc.u8 byte, [$1]; or.b32 $0, byte, 0x4B000000; }", "=r,l", [table + place],
                dtype=tl.float32, is_pure=True, pack=1,
            ) - 8388736.0  # the bits of 2**23 + byte  # fmt: skip
    else:
        level = integer(value, LOW, HIGH)
    return level


@triton.jit
def moments(x, h, K: tl.constexpr):
    """sum h, sum h x and sum h x^2."""
    total, dot, energy = h[0], h[0] * x[0], h[0] * x[0] * x[0]
    for k in tl.static_range(1, K):
        weighted = h[k] * x[k]
        total, dot, energy = total + h[k], dot + weighted, energy + weighted * x[k]
    return total, dot, energy


@triton.jit
def range_of(x, h, center, negligible, K: tl.constexpr):
    """Least and largest weight, and the one farthest from 0, of those whose h (x - center)^2 is more than
    ``negligible``; the center if there are none."""
    low, high, reach = center, center, center
    for k in tl.static_range(K):
        away = x[k] - center
        value = tl.where(h[k] * away * away > negligible, x[k], center)
        low, high = tl.minimum(low, value), tl.maximum(high, value)
        reach = tl.where(tl.abs(value) > tl.abs(reach), value, reach)
    return low, high, reach


@triton.jit
def measure(x, h, scale, table, LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, K: tl.constexpr):
    """A, B, C of the groups on scale."""
    to_levels = inverse(scale)
    a, b, c = scale * 0.0, scale * 0.0, scale * 0.0
    for k in tl.static_range(K):
        level = level_of(x[k] * to_levels, table, LOW, HIGH, TABLE)
        residual = x[k] - scale * level
        weighted, weighted_level = h[k] * residual, h[k] * level
        a += weighted * residual
        b += weighted * level
        c += weighted_level * level
    return a, b, c


@triton.jit
def measure_pair(x, h, scale, offset, HIGH: tl.constexpr, K: tl.constexpr):
    """A, B, C, D, F of the groups on scale and offset, levels 0 to HIGH."""
    to_levels = inverse(scale)
    a, b, c, d, f = scale * 0.0, scale * 0.0, scale * 0.0, scale * 0.0, scale * 0.0
    for k in tl.static_range(K):
        value = x[k] - offset
        level = integer(value * to_levels, 0.0, HIGH)
        residual = value - scale * level
        weighted, weighted_level = h[k] * residual, h[k] * level
        a += weighted * residual
        b += weighted * level
        c += weighted_level * level
        d += weighted_level
        f += weighted
    return a, b, c, d, f


@triton.jit
def per_block(values, GROUPS: tl.constexpr, N: tl.constexpr):
    """The sum of the groups of a block, in all their lanes."""
    if GROUPS == 1:
        return values
    sums = tl.sum(tl.reshape(values, [N // GROUPS, GROUPS]), axis=1)
    return _spread(sums, GROUPS, N)


@triton.jit
def least_of_block(values, GROUPS: tl.constexpr, N: tl.constexpr):
    if GROUPS == 1:
        return values
    return _spread(tl.min(tl.reshape(values, [N // GROUPS, GROUPS]), axis=1), GROUPS, N)


@triton.jit
def farthest_of_block(values, GROUPS: tl.constexpr, N: tl.constexpr):
    """The value farthest from 0 among those of a block, the first of equals, in all its lanes."""
    if GROUPS == 1:
        return values
    away = tl.abs(values)
    place = (tl.arange(0, N) % GROUPS).to(tl.float32)
    first = least_of_block(tl.where(away == -least_of_block(-away, GROUPS, N), place, N), GROUPS, N)
    return per_block(tl.where(place == first, values, 0.0), GROUPS, N)


@triton.jit
def _spread(values, GROUPS: tl.constexpr, N: tl.constexpr):
    return tl.reshape(tl.broadcast_to(values[:, None], [N // GROUPS, GROUPS]), [N])


@triton.jit
def best_units(
    scale, curvature, LOW: tl.constexpr, HIGH: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr
):
    """The three most promising d: their multiples come nearest to the scales, by the curvature of each group's
    error."""
    reach = farthest_of_block(scale, GROUPS, N)
    first, second, third = scale * 0.0, scale * 0.0, scale * 0.0
    error_1, error_2, error_3 = scale * 0.0 + float("inf"), scale * 0.0 + float("inf"), scale * 0.0 + float("inf")
    both: tl.constexpr = 2 if LOW < 0 else 1
    for attempt in range(both * UNITS):
        end = tl.where(attempt < (both - 1) * UNITS, LOW + attempt, HIGH - attempt + (both - 1) * UNITS)
        d = nonzero_half(reach / (end * 1.0))
        miss = scale - d * integer(scale / d, LOW, HIGH)
        error = per_block(curvature * miss * miss, GROUPS, N)
        is_first, is_second, is_third = error < error_1, error < error_2, error < error_3
        third = tl.where(is_second, second, tl.where(is_third, d, third))
        error_3 = tl.where(is_second, error_2, tl.where(is_third, error, error_3))
        second = tl.where(is_first, first, tl.where(is_second, d, second))
        error_2 = tl.where(is_first, error_1, tl.where(is_second, error, error_2))
        first, error_1 = tl.where(is_first, d, first), tl.where(is_first, error, error_1)
    return first, second, third
