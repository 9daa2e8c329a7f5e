# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Types without offsets on a GPU: the search of `quantkit.schemes.ggml.symmetric`, a group to a thread."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.ggml_constants import NEAR, NEIGHBOUR, REFINED, TIE, UNITS, WIDE
from quantkit.kernels.triton.ggml.groups import (
    SIZES,
    best_units,
    far_integer,
    farthest_of_block,
    load_groups,
    measure,
    moments,
    nonzero_half,
    per_block,
    range_of,
    ratio,
)

_TIE = tl.constexpr(TIE)
_UNITS = tl.constexpr(UNITS)
_REFINED = tl.constexpr(REFINED)
_NEIGHBOUR = tl.constexpr(NEIGHBOUR)
_NEAR = tl.constexpr(NEAR)
_WIDER = tl.constexpr(WIDE - NEAR)


@triton.jit(do_not_specialize=SIZES)
def search_symmetric(
    weight, importance, shares, table, d_out, sub_out, n_groups, row_groups, n_rows, matters,
    POINTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
    MIN_SUB: tl.constexpr, MAX_SUB: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """weight (B, n_rows, in) and importance (B, in), in = row_groups * K; shares (POINTS,); table: see `level_of`.
    Fill d_out (n_groups / GROUPS,) and, unless MAX_SUB is 0, sub_out (n_groups,)."""
    group = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = group < n_groups
    row = group // row_groups
    x = load_groups(weight, group * K, inside, K, N)
    h = load_groups(importance, ((row // n_rows) * row_groups + (group - row * row_groups)) * K, inside, K, N)
    _, _, energy = moments(x, h, K)
    _, _, reach = range_of(x, h, energy * 0.0, energy * matters, K)
    scale, curvature = _scale_of_group(
        x, h, shares, table, energy, reach, POINTS, 0 if MAX_SUB > 0 else _REFINED, LOW, HIGH, TABLE, K
    )
    if MAX_SUB > 0:
        d, sub = _units_and_integers(
            x, h, table, energy, reach, scale, curvature, LOW, HIGH, TABLE, MIN_SUB, MAX_SUB, K, GROUPS, N
        )
        tl.store(sub_out + group, sub.to(tl.int16), mask=inside)
    else:
        d = _stored_scale(x, h, table, energy, reach, scale, LOW, HIGH, TABLE, K)
    tl.store(d_out + group // GROUPS, d, mask=inside & (group % GROUPS == 0))


@triton.jit
def _scale_of_group(
    x, h, shares, table, energy, reach,
    POINTS: tl.constexpr, REFINE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The best scale of each group alone (sign and size are free), and the curvature of its error."""
    largest, tie = tl.abs(reach) / (HIGH if HIGH > -LOW else -LOW), energy * _TIE
    best_error, best, curvature = energy * 0.0 + float("inf"), largest, energy * 0.0
    step_of_shares = tl.load(shares + 1) - tl.load(shares)
    for attempt in range(POINTS + REFINE):
        share = tl.load(shares + attempt, mask=attempt < POINTS, other=0.0)
        scale = largest * share
        if REFINE > 0:  # between the best range and its neighbours
            part = ((attempt - POINTS) * 2 - REFINE + 1) * 1.0 / (REFINE + 1)
            scale = tl.where(attempt < POINTS, scale, best * (1.0 + part * step_of_shares))
        a, b, c = measure(x, h, scale, table, LOW, HIGH, TABLE, K)
        step = ratio(b, c)
        error = a - step * b
        better = error + tie < best_error
        best_error, best = tl.where(better, error, best_error), tl.where(better, scale + step, best)
        curvature = tl.where(better, c, curvature)
    return best, curvature


@triton.jit
def _stored_scale(
    x, h, table, energy, reach, scale,
    LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The best of: the scale rounded to float16, refitted and rounded again, those that just reach the largest weight;
    then of its neighbours."""
    best_error, best = energy, energy * 0.0
    for attempt in range(9):
        at_end = reach / tl.where(attempt == 3, LOW * 1.0, HIGH * 1.0)
        beside = best * (1.0 + tl.where(attempt % 2 == 1, _NEIGHBOUR, -_NEIGHBOUR))
        scale = nonzero_half(tl.where(attempt < 3, scale, tl.where(attempt < 5, at_end, beside)))
        a, b, c = measure(x, h, scale, table, LOW, HIGH, TABLE, K)
        better = a < best_error
        best_error, best = tl.where(better, a, best_error), tl.where(better, scale, best)
        scale += ratio(b, c)
    return best


@triton.jit
def _units_and_integers(
    x, h, table, energy, reach, scale, curvature,
    LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, MIN_SUB: tl.constexpr, MAX_SUB: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """d and the sub-scale of each group: from the three most promising d, from the smallest that still reaches the
    largest weight with the sub-scale at its end, and at last from the best of all with more sub-scales."""
    d_1, d_2, d_3 = best_units(scale, curvature, MIN_SUB, MAX_SUB, _UNITS, GROUPS, N)
    farthest = farthest_of_block(reach, GROUPS, N)
    smallest = nonzero_half(farthest / (LOW * MIN_SUB))
    at_end = tl.where(tl.abs(reach) == tl.abs(farthest), smallest * MIN_SUB, scale)
    zero = scale * 0.0
    best_error, best, best_sub = zero + float("inf"), zero, zero
    for start in range(5):
        d = tl.where(start == 0, d_1, tl.where(start == 1, d_2, tl.where(start == 2, d_3, smallest)))
        d = tl.where(start == 4, best, d)
        wanted = tl.where(start < 3, scale, tl.where(start == 3, at_end, best * best_sub))
        # The integers of the least error, then d by least squares for them.
        least, b, c, sub = energy, zero, zero, zero
        middle = far_integer(wanted / d)
        for move in range(-_NEAR - (start // 4) * _WIDER, _NEAR + (start // 4) * _WIDER + 1):
            tried = tl.minimum(tl.maximum(middle + move * 1.0, MIN_SUB), MAX_SUB)
            error, slope, norm = measure(x, h, d * tried, table, LOW, HIGH, TABLE, K)
            better = error < least
            least, sub = tl.where(better, error, least), tl.where(better, tried, sub)
            b, c = tl.where(better, slope, b), tl.where(better, norm, c)
        error = per_block(least, GROUPS, N)
        better = error < best_error
        best_error, best = tl.where(better, error, best_error), tl.where(better, d, best)
        best_sub = tl.where(better, sub, best_sub)
        d = nonzero_half(d + ratio(per_block(sub * b, GROUPS, N), per_block(sub * sub * c, GROUPS, N)))
        error, _, _ = measure(x, h, d * sub, table, LOW, HIGH, TABLE, K)
        error = per_block(error, GROUPS, N)
        better = error < best_error
        best_error, best = tl.where(better, error, best_error), tl.where(better, d, best)
        best_sub = tl.where(better, sub, best_sub)
    return best, best_sub
