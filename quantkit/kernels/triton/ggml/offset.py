# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false, reportGeneralTypeIssues=false
"""Types with offsets on a GPU: the search of `quantkit.schemes.ggml.offset`, a group to a thread."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.ggml_constants import ENDS, PAIRS, TIE, UNITS
from quantkit.kernels.triton.ggml.groups import (
    SIZES,
    best_units,
    far_integer,
    farthest_of_block,
    half,
    integer,
    least_of_block,
    load_groups,
    measure_pair,
    moments,
    nonzero_half,
    per_block,
    range_of,
    ratio,
)

_TIE = tl.constexpr(TIE)
_ENDS = tl.constexpr(ENDS)
_UNITS = tl.constexpr(UNITS)
_N_PAIRS = tl.constexpr(len(PAIRS))
_OF_D = tl.constexpr(sum(d << 2 * place for place, (d, _) in enumerate(PAIRS)))
_OF_DMIN = tl.constexpr(sum(dmin << 2 * place for place, (_, dmin) in enumerate(PAIRS)))
"""The two members of PAIRS, two bits for each pair."""


@triton.jit(do_not_specialize=SIZES)
def search_offset(
    weight, importance, shares, d_out, dmin_out, sub_out, low_out, n_groups, row_groups, n_rows, matters,
    POINTS: tl.constexpr, HIGH: tl.constexpr, MAX_SUB: tl.constexpr, MAX_LOW: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """weight (B, n_rows, in) and importance (B, in), in = row_groups * K; shares (POINTS,): fill d_out, dmin_out
    (n_groups / GROUPS,) and, unless MAX_SUB is 0 (then dmin is added), sub_out and low_out (n_groups,)."""
    group = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = group < n_groups
    row = group // row_groups
    x = load_groups(weight, group * K, inside, K, N)
    h = load_groups(importance, ((row // n_rows) * row_groups + (group - row * row_groups)) * K, inside, K, N)
    total, dot, energy = moments(x, h, K)
    mean = dot / total
    lowest = x[0]
    for k in tl.static_range(1, K):
        lowest = tl.minimum(lowest, x[k])
    # dmin has one sign for all groups: negative (offsets above 0) only where all weights are above 0.
    limit = lowest * 0.0 + float("inf")
    if MAX_SUB > 0:
        limit = tl.where(least_of_block(lowest, GROUPS, N) > 0, limit, 0.0)
    # About the mean, the energy is less by dot * mean: but rounding would decide for groups that hardly vary.
    around = energy * 0.0
    for k in tl.static_range(K):
        away = x[k] - mean
        around += h[k] * away * away
    bottom, top, _ = range_of(x, h, mean, around * matters, K)
    bottom = tl.minimum(bottom, limit)
    width = (top - bottom) / HIGH
    scale, offset, curvature = _pair_of_group(x, h, shares, total, energy, bottom, top, width, limit, POINTS, HIGH, K)
    if MAX_SUB > 0:
        d, dmin, sub, low = _units_and_integers(
            x, h, total, scale, offset, curvature, width, bottom, HIGH, MAX_SUB, MAX_LOW, K, GROUPS, N
        )
        tl.store(sub_out + group, sub.to(tl.int16), mask=inside)
        tl.store(low_out + group, low.to(tl.int16), mask=inside)
    else:
        d, dmin = _stored_pair(x, h, total, energy, scale, offset, HIGH, K)
    first = inside & (group % GROUPS == 0)
    tl.store(d_out + group // GROUPS, d, mask=first)
    tl.store(dmin_out + group // GROUPS, dmin, mask=first)


@triton.jit
def _solve(a, b, c, d, f, total, room):
    """Least-squares steps of scale and offset for the same codes, and the error after them. The offset rises by no more
    than ``room``."""
    det = c * total - d * d
    shift = tl.where(det > 1e-6 * c * total, (f * c - b * d) / det, ratio(f, total))
    shift = tl.minimum(shift, room)
    step = ratio(b - shift * d, c)
    error = a - 2.0 * (step * b + shift * f) + step * step * c + 2.0 * step * shift * d + shift * shift * total
    return step, shift, error


@triton.jit
def _pair_of_group(
    x, h, shares, total, energy, bottom, top, width, limit,
    POINTS: tl.constexpr, HIGH: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The best scale and offset of each group alone, the offset not above ``limit``; the curvature along the scale."""
    infinite = energy * 0.0 + float("inf")
    tie = energy * _TIE
    best_error, best_scale, best_offset, best_curvature = infinite, width, bottom, energy * 0.0
    for mode in range(3):
        clipped = mode * 0.5  # the share of what a smaller range leaves out that goes at the bottom
        error, scale, offset = infinite, width, bottom
        for attempt in range(POINTS + 1):
            # After all ranges, the best of them once more, refitted.
            refit = attempt == POINTS
            share = tl.load(shares + attempt, mask=attempt < POINTS, other=1.0)
            tried = tl.where(refit, scale, width * share)
            start = tl.where(refit, offset, tl.minimum(bottom + clipped * (1.0 - share) * (top - bottom), limit))
            a, b, c, d, f = measure_pair(x, h, tried, start, HIGH, K)
            step, shift, found = _solve(a, b, c, d, f, total, limit - start)
            better = (found + tie < error) | refit
            error, scale = tl.where(better, found, error), tl.where(better, tried + step, scale)
            offset = tl.where(better, start + shift, offset)
            better = refit & (found + tie < best_error)
            best_error, best_scale = tl.where(better, found, best_error), tl.where(better, scale, best_scale)
            best_offset, best_curvature = tl.where(better, offset, best_offset), tl.where(better, c, best_curvature)
    return best_scale, best_offset, best_curvature


@triton.jit
def _stored_pair(x, h, total, energy, scale, offset, HIGH: tl.constexpr, K: tl.constexpr):
    """Float16 scale and offset of a block that is one group. See the twin for what is tried."""
    bottom, top = x[0], x[0]
    for k in tl.static_range(1, K):
        bottom, top = tl.minimum(bottom, x[k]), tl.maximum(top, x[k])
    best_error, best_d, best_dmin = energy, energy * 0.0, energy * 0.0
    for attempt in range(4 + _ENDS):
        end = HIGH - tl.maximum(attempt - 4, 0) * 1.0
        scale = tl.where(attempt == 3, bottom - half(bottom), tl.where(attempt > 3, (top - bottom) / end, scale))
        offset = tl.where(attempt >= 3, bottom, offset)
        d, dmin = nonzero_half(scale), half(offset)
        for _ in range(2):
            a, b, c, cross, f = measure_pair(x, h, d, dmin, HIGH, K)
            better = a < best_error
            best_error = tl.where(better, a, best_error)
            best_d, best_dmin = tl.where(better, d, best_d), tl.where(better, dmin, best_dmin)
            step, shift, _ = _solve(a, b, c, cross, f, total, float("inf"))
            scale, offset = d + step, dmin + shift
            dmin = half(dmin + ratio(f, total))
    return best_d, best_dmin


@triton.jit
def _units_and_integers(
    x, h, total, scale, offset, curvature, width, bottom,
    HIGH: tl.constexpr, MAX_SUB: tl.constexpr, MAX_LOW: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """d, dmin, and the integers of each group."""
    d_1, d_2, d_3 = best_units(scale, curvature, 0, MAX_SUB, _UNITS, GROUPS, N)
    d_4 = nonzero_half(farthest_of_block(width, GROUPS, N) / MAX_SUB)
    dmin_1, dmin_2, dmin_3 = best_units(-offset, total, 0, MAX_LOW, _UNITS, GROUPS, N)
    dmin_4 = nonzero_half(farthest_of_block(bottom, GROUPS, N) / -MAX_LOW)
    zero = scale * 0.0
    best_error, best_d, best_dmin, best_sub, best_low = zero + float("inf"), zero, zero, zero, zero
    for pair in range(_N_PAIRS):
        d = _chosen((_OF_D >> 2 * pair) & 3, d_1, d_2, d_3, d_4)
        dmin = _chosen((_OF_DMIN >> 2 * pair) & 3, dmin_1, dmin_2, dmin_3, dmin_4)
        # The integers of the least error, then d and dmin by least squares for them.
        sub, low, a, b, c, cross, f = _integer_pairs(x, h, total, d, dmin, scale, offset, HIGH, MAX_SUB, MAX_LOW, K)
        error = per_block(a, GROUPS, N)
        better = error < best_error
        best_error, best_d, best_dmin = (
            tl.where(better, error, best_error), tl.where(better, d, best_d), tl.where(better, dmin, best_dmin)
        )  # fmt: skip
        best_sub, best_low = tl.where(better, sub, best_sub), tl.where(better, low, best_low)
        step, shift, _ = _solve(
            error, per_block(sub * b, GROUPS, N), per_block(sub * sub * c, GROUPS, N),
            -per_block(low * sub * cross, GROUPS, N), -per_block(low * f, GROUPS, N),
            per_block(low * low * total, GROUPS, N), float("inf"),
        )  # fmt: skip
        d, dmin = nonzero_half(d + step), nonzero_half(dmin + shift)
        a, _, _, _, _ = measure_pair(x, h, d * sub, -dmin * low, HIGH, K)
        error = per_block(a, GROUPS, N)
        better = error < best_error
        best_error, best_d, best_dmin = (
            tl.where(better, error, best_error), tl.where(better, d, best_d), tl.where(better, dmin, best_dmin)
        )  # fmt: skip
        best_sub, best_low = tl.where(better, sub, best_sub), tl.where(better, low, best_low)
    return best_d, best_dmin, best_sub, best_low


@triton.jit
def _chosen(place, first, second, third, fourth):
    return tl.where(place == 0, first, tl.where(place == 1, second, tl.where(place == 2, third, fourth)))


@triton.jit
def _integer_pairs(
    x, h, total, d, dmin, scale, offset,
    HIGH: tl.constexpr, MAX_SUB: tl.constexpr, MAX_LOW: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sub-scale and sub-minimum of the least true error: next to scale / d, each with the minimum that suits it;
    then the sums of that choice."""
    zero = scale * 0.0
    best_a, best_sub, best_low = zero + float("inf"), zero, zero
    best_b, best_c, best_cross, best_f = zero, zero, zero, zero
    middle, first_low = far_integer(scale / d), integer(-offset / dmin, 0.0, MAX_LOW)
    low = first_low
    for attempt in range(6):
        sub = tl.minimum(tl.maximum(middle + (attempt // 2 - 1) * 1.0, 0.0), MAX_SUB)
        low = tl.where(attempt % 2 == 0, first_low, low)
        a, b, c, cross, f = measure_pair(x, h, d * sub, -dmin * low, HIGH, K)
        better = a < best_a
        best_a, best_sub, best_low = (
            tl.where(better, a, best_a),
            tl.where(better, sub, best_sub),
            tl.where(better, low, best_low),
        )
        best_b, best_c = tl.where(better, b, best_b), tl.where(better, c, best_c)
        best_cross, best_f = tl.where(better, cross, best_cross), tl.where(better, f, best_f)
        low = integer(low - f / (total * dmin), 0.0, MAX_LOW)
    return best_sub, best_low, best_a, best_b, best_c, best_cross, best_f
