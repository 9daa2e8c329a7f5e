"""Types without offsets: the search of `quantkit.schemes.ggml_search` for sixteen rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quantkit.kernels.ggml_lanes import ROWS, absolute, least, load, most, rint, splat, store, where_less
from quantkit.kernels.ggml_tile import Floats, fill, measure, nonzero_half, range_of, ratio

Integers = NDArray[np.int16]
INFINITY = np.float32(np.inf)
import os
WIDE=int(os.environ.get('WIDE','0'))
REACH=int(os.environ.get('REACH','1'))
ROUNDS = int(os.environ.get('ROUNDS','2'))
UNITS = 15
"""Ratios of d tried for each end of the sub-scales."""


@njit(cache=True, nogil=True)
def search_symmetric(
    weight: Floats,
    h: Floats,
    rows: tuple[int, int],
    block: int,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    shares: Floats,
    limits: tuple[int, int],
    d_out: Floats,
    sub_out: Integers,
) -> None:
    """weight (out, in), h (in,): fill rows[0] to rows[1] of d_out (out, blocks) and sub_out (out, groups). ``shares``:
    the ranges to try; ``limits``: of the sub-scales, (1, 1) if the type has none."""
    tile = np.empty(block * ROWS, np.float32)
    groups = block // group
    scale, curvature = np.empty(groups * ROWS, np.float32), np.empty(groups * ROWS, np.float32)
    energy, sub, best_sub = np.empty_like(scale), np.empty_like(scale), np.empty_like(scale)
    d = np.empty(ROWS, np.float32)
    for row in range(rows[0], rows[1], ROWS):
        for column in range(0, weight.shape[1], block):
            fill(tile, weight[: rows[1]], row, column, block)
            block_h = h[column : column + block]
            for g in range(groups):
                _scale_of_group(tile, block_h, g, group, levels, table, shares, scale, curvature, energy)
            if limits[0] == limits[1]:
                found = _stored_scale(tile, block_h, group, levels, table, scale, energy)
            else:
                found = _units_and_integers(
                    tile, block_h, group, levels, table, limits, scale, curvature, energy, sub, best_sub
                )
            store(d, 0, found)
            for lane in range(min(ROWS, rows[1] - row)):
                d_out[row + lane, column // block] = d[lane]
                for g in range(groups):
                    if limits[0] != limits[1]:
                        sub_out[row + lane, column // group + g] = np.int16(best_sub[g * ROWS + lane])


@njit(cache=True, nogil=True)
def _scale_of_group(
    tile: Floats,
    h: Floats,
    g: int,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    shares: Floats,
    scale_out: Floats,
    curvature_out: Floats,
    energy_out: Floats,
) -> None:
    """The best scale of one group alone: sign and size are free."""
    start, stop = g * group, (g + 1) * group
    _, _, reach, energy = range_of(tile, h, start, stop)
    largest = absolute(reach) / max(-levels[0], levels[1])
    best_error, best, curvature = splat(INFINITY), largest, splat(0.0)
    for share in shares:
        scale = largest * share
        a, b, c = measure(tile, h, start, stop, scale, levels[0], levels[1], table)
        step = ratio(b, c)
        error = a - step * b
        best = where_less(error, best_error, scale + step, best)
        curvature = where_less(error, best_error, c, curvature)
        best_error = least(error, best_error)
    store(scale_out, g * ROWS, best)
    store(curvature_out, g * ROWS, curvature)
    store(energy_out, g * ROWS, energy)


@njit(cache=True, nogil=True)
def _stored_scale(
    tile: Floats, h: Floats, group: int, levels: tuple[float, float], table: Floats, scale: Floats, energy: Floats
) -> Any:
    """The best float16 near the best scale, or the one that just reaches the largest weight."""
    _, _, reach, _ = range_of(tile, h, 0, group)
    best, best_error, center = splat(0.0), load(energy, 0), load(scale, 0)
    for attempt in range(7):
        if attempt < 3:
            candidate = center
        elif attempt == 3:
            candidate = center * np.float32(1 + 2.0**-11)
        elif attempt == 4:
            candidate = center * np.float32(1 - 2.0**-11)
        else:
            candidate = reach / levels[attempt - 5]
        candidate = nonzero_half(candidate)
        a, b, c = measure(tile, h, 0, group, candidate, levels[0], levels[1], table)
        if attempt < 2:
            center = candidate + ratio(b, c)
        best = where_less(a, best_error, candidate, best)
        best_error = least(a, best_error)
    return best


@njit(cache=True, nogil=True)
def _units_and_integers(
    tile: Floats,
    h: Floats,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    limits: tuple[int, int],
    scale: Floats,
    curvature: Floats,
    energy: Floats,
    sub: Floats,
    best_sub: Floats,
) -> Any:
    """d and sub-scales of one block; the latter into best_sub."""
    best_error, best = splat(INFINITY), splat(0.0)
    for d in best_units(scale, curvature, limits):
        for _ in range(ROUNDS):
            error, slope, norm = _integers(tile, h, group, levels, table, limits, d, scale, energy, sub, REACH)
            best, best_error = _keep(error, d, sub, best_error, best, best_sub)
            d = nonzero_half(d + ratio(slope, norm))
            error = _error(tile, h, group, levels, table, d, sub)
            best, best_error = _keep(error, d, sub, best_error, best, best_sub)
    if WIDE:
        for g in range(0, best_sub.size, ROWS):
            store(scale, g, load(best_sub, g) * best)
        error, slope, norm = _integers(tile, h, group, levels, table, limits, best, scale, energy, sub, WIDE)
        best, best_error = _keep(error, best, sub, best_error, best, best_sub)
        d = nonzero_half(best + ratio(slope, norm))
        error = _error(tile, h, group, levels, table, d, sub)
        best, best_error = _keep(error, d, sub, best_error, best, best_sub)
    return best


@njit(cache=True, nogil=True)
def best_units(scale: Floats, curvature: Floats, limits: tuple[int, int]) -> tuple[Any, Any, Any]:
    """The three most promising d: their multiples come nearest to the scales, by the curvature of each group's
    error."""
    reach = splat(0.0)
    for g in range(0, scale.size, ROWS):
        reach = where_less(absolute(reach), absolute(load(scale, g)), load(scale, g), reach)
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


@njit(cache=True, nogil=True)
def _integers(
    tile: Floats,
    h: Floats,
    group: int,
    levels: tuple[float, float],
    table: Floats,
    limits: tuple[int, int],
    d: Any,
    scale: Floats,
    energy: Floats,
    sub_out: Floats,
    reach: int,
) -> tuple[Any, Any, Any]:
    """The sub-scales of the least true error next to scale / d: error, and slope and curvature of it along d."""
    error, slope, norm, to_integer = splat(0.0), splat(0.0), splat(0.0), 1.0 / d
    low, high = splat(np.float32(limits[0])), splat(np.float32(limits[1]))
    for g in range(scale.size // ROWS):
        best_a, best_b, best_c, best = load(energy, g * ROWS), splat(0.0), splat(0.0), splat(0.0)
        middle = rint(load(scale, g * ROWS) * to_integer)
        for step in range(-reach, reach + 1):
            sub = least(most(middle + np.float32(step), low), high)
            a, b, c = measure(tile, h, g * group, (g + 1) * group, d * sub, levels[0], levels[1], table)
            best, best_b = where_less(a, best_a, sub, best), where_less(a, best_a, b, best_b)
            best_c, best_a = where_less(a, best_a, c, best_c), least(a, best_a)
        store(sub_out, g * ROWS, best)
        error, slope, norm = error + best_a, slope + best * best_b, norm + best * best * best_c
    return error, slope, norm


@njit(cache=True, nogil=True)
def _error(tile: Floats, h: Floats, group: int, levels: tuple[float, float], table: Floats, d: Any, sub: Floats) -> Any:
    """The true error of a block."""
    error = splat(0.0)
    for g in range(sub.size // ROWS):
        scale = d * load(sub, g * ROWS)
        a, _, _ = measure(tile, h, g * group, (g + 1) * group, scale, levels[0], levels[1], table)
        error = error + a
    return error


@njit(cache=True, nogil=True)
def _keep(error: Any, d: Any, sub: Floats, best_error: Any, best: Any, best_sub: Floats) -> tuple[Any, Any]:
    """Take over d and sub in the lanes where the error is the least so far."""
    for g in range(0, sub.size, ROWS):
        store(best_sub, g, where_less(error, best_error, load(sub, g), load(best_sub, g)))
    return where_less(error, best_error, d, best), least(error, best_error)
