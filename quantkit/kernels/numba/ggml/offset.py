"""Types with offsets: the search of `quantkit.schemes.ggml.symmetric` for sixteen rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.ggml_constants import ENDS, HALF_MAX, PAIRS, TIE
from quantkit.kernels.numba.ggml.symmetric import best_units, farthest_of
from quantkit.kernels.numba.lanes import (
    ROWS,
    fma,
    half,
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
from quantkit.kernels.numba.tile import Floats, fill, inverse, measure_pair, moments, nonzero_half, range_of, ratio

Integers = NDArray[np.int16]
INFINITY = np.float32(np.inf)
# Sums kept of each group, in units of a row of lanes.
SCALE, OFFSET, WIDTH, BOTTOM, CURVATURE, TOTAL, SUB, LOW, BEST_SUB, BEST_LOW, B, C, D, F, FIELDS = range(15)


@kernel
def search_offset(
    weight: Floats,
    h: Floats,
    rows: tuple[int, int],
    block: int,
    group: int,
    high: float,
    shares: Floats,
    matters: float,
    limits: tuple[int, int],
    d_out: Floats,
    dmin_out: Floats,
    sub_out: Integers,
    low_out: Integers,
) -> None:
    """weight (out, in), h (in,): fill rows[0] to rows[1] of d_out, dmin_out (out, blocks), and of sub_out, low_out
    (out, groups) unless limits (the highest sub-scale and sub-minimum) are (1, 1): then dmin is added."""
    tile = np.empty(block * ROWS, np.float32)
    groups = block // group
    state = np.zeros((FIELDS, groups * ROWS), np.float32)
    d, dmin = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    single = limits[0] == 1
    for row in range(rows[0], rows[1], ROWS):
        for column in range(0, weight.shape[1], block):
            fill(tile, weight[: rows[1]], row, column, block)
            block_h = h[column : column + block]
            # dmin has one sign for all groups: negative (offsets above 0) only where all weights are above 0.
            limit = where_less(
                splat(0.0),
                range_of(tile, block_h, 0, block, splat(INFINITY), splat(-1.0))[0],
                splat(INFINITY),
                splat(0.0),
            )
            if single:
                limit = splat(INFINITY)
            for g in range(groups):
                pair_of_group(tile, block_h, g, group, high, shares, matters, limit, state)
            if single:
                found = stored_pair(tile, block_h, group, high, state)
            else:
                found = units_and_integers(tile, block_h, group, high, limits, state)
            store(d, 0, found[0])
            store(dmin, 0, found[1])
            for lane in range(min(ROWS, rows[1] - row)):
                d_out[row + lane, column // block] = d[lane]
                dmin_out[row + lane, column // block] = dmin[lane]
                for g in range(groups):
                    if not single:
                        sub_out[row + lane, column // group + g] = np.int16(state[BEST_SUB, g * ROWS + lane])
                        low_out[row + lane, column // group + g] = np.int16(state[BEST_LOW, g * ROWS + lane])


@part
def solve(a: Any, b: Any, c: Any, d: Any, f: Any, total: Any, room: Any) -> tuple[Any, Any, Any]:
    """Least-squares steps of scale and offset for the same codes, and the error after them. The offset rises by no more
    than ``room``."""
    det = c * total - d * d
    usable = c * total * 1e-6
    shift = where_less(usable, det, (f * c - b * d) / det, ratio(f, total))
    shift = least(shift, room)
    step = ratio(b - shift * d, c)
    error = a - 2.0 * (step * b + shift * f) + step * step * c + 2.0 * step * shift * d + shift * shift * total
    return step, shift, error


@part
def pair_of_group(
    tile: Floats, h: Floats, g: int, group: int, high: float, shares: Floats, matters: float, limit: Any, state: Floats
) -> None:
    """The best scale and offset of one group alone; the offset is not above ``limit``."""
    start, stop = g * group, (g + 1) * group
    total, dot, energy = moments(tile, h, start, stop)
    mean = dot / total
    bottom, top, _ = range_of(tile, h, start, stop, mean, (energy - dot * mean) * matters)
    bottom = least(bottom, limit)
    width = (top - bottom) / high
    to_width = inverse(width)
    best_error, best_scale, best_offset, curvature = splat(INFINITY), width, bottom, splat(0.0)
    for clipped in (0.0, 0.5, 1.0):
        mode_error, mode_scale, mode_offset = splat(INFINITY), width, bottom
        for share in shares:
            scale, to_levels = width * share, to_width * (np.float32(1.0) / share)
            offset = least(bottom + np.float32(clipped * (1.0 - share)) * (top - bottom), limit)
            a, b, c, d, f = measure_pair(tile, h, start, stop, scale, to_levels, offset, high)
            step, shift, error = solve(a, b, c, d, f, total, limit - offset)
            behind = fma(energy, splat(TIE), error)
            mode_scale = where_less(behind, mode_error, scale + step, mode_scale)
            mode_offset = where_less(behind, mode_error, offset + shift, mode_offset)
            mode_error = where_less(behind, mode_error, error, mode_error)
        a, b, c, d, f = measure_pair(tile, h, start, stop, mode_scale, inverse(mode_scale), mode_offset, high)
        step, shift, mode_error = solve(a, b, c, d, f, total, limit - mode_offset)
        mode_scale, mode_offset = mode_scale + step, mode_offset + shift
        behind = fma(energy, splat(TIE), mode_error)
        best_scale = where_less(behind, best_error, mode_scale, best_scale)
        best_offset = where_less(behind, best_error, mode_offset, best_offset)
        curvature = where_less(behind, best_error, c, curvature)
        best_error = where_less(behind, best_error, mode_error, best_error)
    store(state[SCALE], g * ROWS, best_scale)
    store(state[OFFSET], g * ROWS, best_offset)
    store(state[CURVATURE], g * ROWS, curvature)
    store(state[TOTAL], g * ROWS, total)
    store(state[WIDTH], g * ROWS, width)
    store(state[BOTTOM], g * ROWS, bottom)


@part
def limited_half(value: Any) -> Any:
    """The nearest float16."""
    return half(least(most(value, splat(-HALF_MAX)), splat(HALF_MAX)))


@part
def stored_pair(tile: Floats, h: Floats, group: int, high: float, state: Floats) -> tuple[Any, Any]:
    """Float16 scale and offset: the best, its offset refitted on the rounded scale; what rounding the offset of a
    constant leaves; and ranges that meet the largest weight with one of the highest levels: some of their scales are
    hardly rounded, which decides if one weight is huge."""
    total, _, energy = moments(tile, h, 0, group)
    bottom, top, _ = range_of(tile, h, 0, group, load(tile, 0), splat(-1.0))
    best_error, best_d, best_dmin = energy, splat(0.0), splat(0.0)
    scale, offset = load(state[SCALE], 0), load(state[OFFSET], 0)
    for attempt in range(4 + ENDS):
        if attempt == 3:
            scale, offset = bottom - limited_half(bottom), bottom
        elif attempt > 3:
            scale, offset = (top - bottom) / (high - np.float32(attempt - 4)), bottom
        d, dmin = nonzero_half(scale), limited_half(offset)
        for _ in range(2):
            a, b, c, dd, f = measure_pair(tile, h, 0, group, d, inverse(d), dmin, high)
            best_d = where_less(a, best_error, d, best_d)
            best_dmin = where_less(a, best_error, dmin, best_dmin)
            best_error = least(a, best_error)
            step, shift, _ = solve(a, b, c, dd, f, total, splat(INFINITY))
            scale, offset = d + step, dmin + shift
            dmin = limited_half(dmin + ratio(f, total))
    return best_d, best_dmin


@part
def units_and_integers(
    tile: Floats, h: Floats, group: int, high: float, limits: tuple[int, int], state: Floats
) -> tuple[Any, Any]:
    """d, dmin and the integers of one block; the latter into the fields BEST_SUB and BEST_LOW."""
    for place in range(state.shape[1]):
        state[OFFSET, place] = -state[OFFSET, place]
    ds = with_smallest(best_units(state[SCALE], state[CURVATURE], (0, limits[0])), state[WIDTH], limits[0])
    dmins = with_smallest(best_units(state[OFFSET], state[TOTAL], (0, limits[1])), state[BOTTOM], -limits[1])
    best_error, best_d, best_dmin = splat(INFINITY), splat(0.0), splat(0.0)
    for pair in PAIRS:
        d, dmin = ds[pair[0]], dmins[pair[1]]
        error = integer_pairs(tile, h, group, high, limits, d, dmin, state)
        best_error, best_d, best_dmin = keep(error, d, dmin, best_error, best_d, best_dmin, state)
        d, dmin = refit(d, dmin, error, state)
        error = error_of(tile, h, group, high, d, dmin, state)
        best_error, best_d, best_dmin = keep(error, d, dmin, best_error, best_d, best_dmin, state)
    return best_d, best_dmin


@part
def with_smallest(units: tuple[Any, Any, Any], reach: Floats, end: int) -> tuple[Any, Any, Any, Any]:
    """The units, and the smallest that still covers the ranges of all groups."""
    return units[0], units[1], units[2], nonzero_half(farthest_of(reach) / np.float32(end))


@part
def integer_pairs(
    tile: Floats, h: Floats, group: int, high: float, limits: tuple[int, int], d: Any, dmin: Any, state: Floats
) -> Any:
    """The sub-scale and sub-minimum of the least true error: next to scale / d, each with the minimum that suits it."""
    error, to_sub, to_low = splat(0.0), inverse(d), inverse(dmin)
    zero, most_sub, most_low = splat(0.0), splat(np.float32(limits[0])), splat(np.float32(limits[1]))
    for g in range(state.shape[1] // ROWS):
        start, stop, place = g * group, (g + 1) * group, g * ROWS
        middle = rint(load(state[SCALE], place) * to_sub)
        first_low = least(most(rint(load(state[OFFSET], place) * to_low), zero), most_low)
        to_step = ratio(to_low, load(state[TOTAL], place))
        best_a, best_sub, best_low = splat(INFINITY), zero, zero
        best_b, best_c, best_dd, best_f = zero, zero, zero, zero
        for step in range(-1, 2):
            sub, low = least(most(middle + np.float32(step), zero), most_sub), first_low
            for _ in range(2):
                a, b, c, dd, f = measure_pair(tile, h, start, stop, d * sub, inverse(d * sub), 0.0 - dmin * low, high)
                best_sub, best_low = where_less(a, best_a, sub, best_sub), where_less(a, best_a, low, best_low)
                best_b, best_c = where_less(a, best_a, b, best_b), where_less(a, best_a, c, best_c)
                best_dd, best_f = where_less(a, best_a, dd, best_dd), where_less(a, best_a, f, best_f)
                best_a = least(a, best_a)
                low = least(most(rint(low - f * to_step), zero), most_low)
        store(state[SUB], place, best_sub)
        store(state[LOW], place, best_low)
        store(state[B], place, best_b)
        store(state[C], place, best_c)
        store(state[D], place, best_dd)
        store(state[F], place, best_f)
        error = error + best_a
    return error


@part
def refit(d: Any, dmin: Any, error: Any, state: Floats) -> tuple[Any, Any]:
    """Least-squares d and dmin of a block for the same integers and codes."""
    b, c, cross, f, total = splat(0.0), splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for place in range(0, state.shape[1], ROWS):
        sub, low = load(state[SUB], place), load(state[LOW], place)
        b, c = fma(sub, load(state[B], place), b), fma(sub * sub, load(state[C], place), c)
        cross = cross - sub * low * load(state[D], place)
        f, total = f - low * load(state[F], place), fma(low * low, load(state[TOTAL], place), total)
    step, shift, _ = solve(error, b, c, cross, f, total, splat(INFINITY))
    return nonzero_half(d + step), nonzero_half(dmin + shift)


@part
def error_of(tile: Floats, h: Floats, group: int, high: float, d: Any, dmin: Any, state: Floats) -> Any:
    """The true error of a block."""
    error = splat(0.0)
    for g in range(state.shape[1] // ROWS):
        scale, offset = d * load(state[SUB], g * ROWS), 0.0 - dmin * load(state[LOW], g * ROWS)
        error = error + measure_pair(tile, h, g * group, (g + 1) * group, scale, inverse(scale), offset, high)[0]
    return error


@part
def keep(
    error: Any, d: Any, dmin: Any, best_error: Any, best_d: Any, best_dmin: Any, state: Floats
) -> tuple[Any, Any, Any]:
    """Take over d, dmin and the integers in the lanes where the error is the least so far."""
    for place in range(0, state.shape[1], ROWS):
        for now, best in ((SUB, BEST_SUB), (LOW, BEST_LOW)):
            values = where_less(error, best_error, load(state[now], place), load(state[best], place))
            store(state[best], place, values)
    return (
        least(error, best_error),
        where_less(error, best_error, d, best_d),
        where_less(error, best_error, dmin, best_dmin),
    )
