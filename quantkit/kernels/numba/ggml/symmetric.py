"""Types without offsets: the search of `quantkit.schemes.ggml.symmetric` for sixteen rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.ggml_constants import NEAR, NEIGHBOUR, REFINED, TIE, UNITS, WIDE
from quantkit.kernels.numba.lanes import (
    ROWS,
    absolute,
    fma,
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
from quantkit.kernels.numba.tile import Floats, fill, inverse, measure, moments, nonzero_half, range_of, ratio

Integers = NDArray[np.int16]
INFINITY = np.float32(np.inf)
# What is kept of each group: rows of the array ``state`` (FIELDS, groups * 16).
SCALE, CURVATURE, ENERGY, REACH, SUB, BEST_SUB, FIELDS = range(7)


@kernel
def search_symmetric(
    weight: Floats,
    h: Floats,
    rows: tuple[int, int],
    block: int,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    shares: Floats,
    matters: float,
    limits: tuple[int, int],
    d_out: Floats,
    sub_out: Integers,
) -> None:
    """weight (out, in), h (in,): fill rows[0] to rows[1] of d_out (out, blocks) and sub_out (out, groups). ``shares``:
    the ranges to try; ``matters``: the share of a group's energy that lets a weight stretch its range; ``limits``: of
    the sub-scales, (1, 1) if the type has none."""
    tile, groups = np.empty(block * ROWS, np.float32), block // group
    state, d = np.zeros((FIELDS, groups * ROWS), np.float32), np.empty(ROWS, np.float32)
    single = limits[0] == limits[1]
    for row in range(rows[0], rows[1], ROWS):
        for column in range(0, weight.shape[1], block):
            fill(tile, weight[: rows[1]], row, column, block)
            block_h = h[column : column + block]
            for g in range(groups):
                _scale_of_group(tile, block_h, g, group, levels, table, shares, matters, state)
            if single:
                store(d, 0, _stored_scale(tile, block_h, group, levels, table, state))
            else:
                store(d, 0, _units_and_integers(tile, block_h, group, levels, table, limits, state))
            for lane in range(min(ROWS, rows[1] - row)):
                d_out[row + lane, column // block] = d[lane]
                for g in range(groups):
                    if not single:
                        sub_out[row + lane, column // group + g] = np.int16(state[BEST_SUB, g * ROWS + lane])


@part
def _scale_of_group(
    tile: Floats,
    h: Floats,
    g: int,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    shares: Floats,
    matters: float,
    state: Floats,
) -> None:
    """The best scale of one group alone: sign and size are free."""
    start, stop, place = g * group, (g + 1) * group, g * ROWS
    _, _, energy = moments(tile, h, start, stop)
    _, _, reach = range_of(tile, h, start, stop, splat(0.0), energy * matters)
    largest = absolute(reach) / max(-levels[0], levels[1])
    to_largest, best_error, best, curvature = inverse(largest), splat(INFINITY), largest, splat(0.0)
    refined = REFINED if state.shape[1] == ROWS else 0
    for attempt in range(shares.size + refined):
        if attempt < shares.size:
            scale, to_levels = largest * shares[attempt], to_largest * (np.float32(1.0) / shares[attempt])
        else:  # between the best range and its neighbours
            part = np.float32((attempt - shares.size) * 2 - REFINED + 1) / np.float32(REFINED + 1)
            scale = best * (1.0 + part * (shares[1] - shares[0]))
            to_levels = inverse(scale)
        a, b, c = measure(tile, h, start, stop, scale, to_levels, levels[0], levels[1], table)
        step = ratio(b, c)
        error = a - step * b
        behind = fma(energy, splat(TIE), error)
        best = where_less(behind, best_error, scale + step, best)
        curvature = where_less(behind, best_error, c, curvature)
        best_error = where_less(behind, best_error, error, best_error)
    store(state[SCALE], place, best)
    store(state[CURVATURE], place, curvature)
    store(state[ENERGY], place, energy)
    store(state[REACH], place, reach)


@part
def _stored_scale(
    tile: Floats, h: Floats, group: int, levels: tuple[float, float], table: Floats, state: Floats
) -> Any:
    """The best of: the scale rounded to float16, refitted and rounded again, those that just reach the largest weight;
    then of its neighbours."""
    best, best_error, center = splat(0.0), load(state[ENERGY], 0), load(state[SCALE], 0)
    for attempt in range(9):
        if attempt < 3:
            candidate = center
        elif attempt < 5:
            candidate = load(state[REACH], 0) / levels[attempt - 3]
        else:
            candidate = best * (1.0 + (NEIGHBOUR if attempt % 2 else -NEIGHBOUR))
        candidate = nonzero_half(candidate)
        a, b, c = measure(tile, h, 0, group, candidate, inverse(candidate), levels[0], levels[1], table)
        center = candidate + ratio(b, c)
        best = where_less(a, best_error, candidate, best)
        best_error = least(a, best_error)
    return best


@part
def _units_and_integers(
    tile: Floats,
    h: Floats,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    limits: tuple[int, int],
    state: Floats,
) -> Any:
    """d and sub-scales of one block; the latter into the field BEST_SUB."""
    best_error, best = splat(INFINITY), splat(0.0)
    reach = farthest_of(state[REACH])
    first, second, third = best_units(state[SCALE], state[CURVATURE], limits)
    # The smallest d that still reaches the largest weight.
    smallest = nonzero_half(reach / (levels[0] * np.float32(limits[0])))
    for d in (first, second, third):
        best, best_error = _integers_and_unit(tile, h, group, levels, table, limits, d, NEAR, best, best_error, state)
    for place in range(0, state.shape[1], ROWS):
        farther = where_less(absolute(load(state[REACH], place)), absolute(reach), splat(0.0), splat(1.0))
        at_end = smallest * np.float32(limits[0])
        store(state[SCALE], place, where_less(farther, splat(0.5), load(state[SCALE], place), at_end))
    best, best_error = _integers_and_unit(
        tile, h, group, levels, table, limits, smallest, NEAR, best, best_error, state
    )
    for place in range(0, state.shape[1], ROWS):
        store(state[SCALE], place, best * load(state[BEST_SUB], place))
    return _integers_and_unit(tile, h, group, levels, table, limits, best, WIDE, best, best_error, state)[0]


@part
def _integers_and_unit(
    tile: Floats,
    h: Floats,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    limits: tuple[int, int],
    d: Any,
    near: int,
    best: Any,
    best_error: Any,
    state: Floats,
) -> tuple[Any, Any]:
    """Integers for d, then d for the integers; whatever is better than the best so far becomes the best."""
    error, slope, norm = _integers(tile, h, group, levels, table, limits, d, near, state)
    best, best_error = _keep(error, d, best, best_error, state)
    d = nonzero_half(d + ratio(slope, norm))
    error = splat(0.0)
    for g in range(state.shape[1] // ROWS):
        scale = d * load(state[SUB], g * ROWS)
        error = (
            error + measure(tile, h, g * group, (g + 1) * group, scale, inverse(scale), levels[0], levels[1], table)[0]
        )
    return _keep(error, d, best, best_error, state)


@part
def farthest_of(values: Floats) -> Any:
    """The value farthest from 0 among those of all groups."""
    farthest = splat(0.0)
    for place in range(0, values.size, ROWS):
        value = load(values, place)
        farthest = where_less(absolute(farthest), absolute(value), value, farthest)
    return farthest


@part
def best_units(scale: Floats, curvature: Floats, limits: tuple[int, int]) -> tuple[Any, Any, Any]:
    """The three most promising d: their multiples come nearest to the scales, by the curvature of each group's
    error."""
    reach = farthest_of(scale)
    first, second, third = splat(0.0), splat(0.0), splat(0.0)
    errors = splat(INFINITY), splat(INFINITY), splat(INFINITY)
    low, high = splat(np.float32(limits[0])), splat(np.float32(limits[1]))
    for attempt in range(2 * UNITS):
        end = limits[1] - attempt // 2 if attempt % 2 else limits[0] + attempt // 2
        if end * limits[attempt % 2] <= 0:
            continue
        d = nonzero_half(reach / np.float32(end))
        to_integer, error = 1.0 / d, splat(0.0)
        for g in range(0, scale.size, ROWS):
            wanted = load(scale, g)
            miss = wanted - d * least(most(rint(wanted * to_integer), low), high)
            error = error + load(curvature, g) * miss * miss
        third = where_less(error, errors[1], second, where_less(error, errors[2], d, third))
        error_third = where_less(error, errors[1], errors[1], least(error, errors[2]))
        second = where_less(error, errors[0], first, where_less(error, errors[1], d, second))
        error_second = where_less(error, errors[0], errors[0], least(error, errors[1]))
        first = where_less(error, errors[0], d, first)
        errors = least(error, errors[0]), error_second, error_third
    return first, second, third


@part
def _integers(
    tile: Floats,
    h: Floats,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    limits: tuple[int, int],
    d: Any,
    near: int,
    state: Floats,
) -> tuple[Any, Any, Any]:
    """The sub-scales of the least true error next to scale / d: error, and slope and curvature of it along d."""
    error, slope, norm, to_integer = splat(0.0), splat(0.0), splat(0.0), 1.0 / d
    low, high = splat(np.float32(limits[0])), splat(np.float32(limits[1]))
    for g in range(state.shape[1] // ROWS):
        start, stop, place = g * group, (g + 1) * group, g * ROWS
        best_a, best_b, best_c, best = load(state[ENERGY], place), splat(0.0), splat(0.0), splat(0.0)
        middle = rint(load(state[SCALE], place) * to_integer)
        for step in range(-near, near + 1):
            sub = least(most(middle + np.float32(step), low), high)
            a, b, c = measure(tile, h, start, stop, d * sub, inverse(d * sub), levels[0], levels[1], table)
            best, best_b = where_less(a, best_a, sub, best), where_less(a, best_a, b, best_b)
            best_c, best_a = where_less(a, best_a, c, best_c), least(a, best_a)
        store(state[SUB], place, best)
        error, slope, norm = error + best_a, slope + best * best_b, norm + best * best * best_c
    return error, slope, norm


@part
def _keep(error: Any, d: Any, best: Any, best_error: Any, state: Floats) -> tuple[Any, Any]:
    """Take over d and sub-scales in the lanes where the error is the least so far."""
    for place in range(0, state.shape[1], ROWS):
        kept = where_less(error, best_error, load(state[SUB], place), load(state[BEST_SUB], place))
        store(state[BEST_SUB], place, kept)
    return where_less(error, best_error, d, best), least(error, best_error)
