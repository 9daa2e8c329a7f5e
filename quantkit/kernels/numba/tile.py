"""Sixteen rows of a block, column by column, and what coding them on given scales would cost.

A tile is a flat (columns * 16,) float32: weight of column c and row r at 16 c + r. Importance belongs to columns. The
sums A to F are those of the torch twin, `quantkit.schemes.ggml.symmetric`, whose docstring explains them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.ggml_constants import HALF_MAX, HALF_TINY
from quantkit.kernels.numba.lanes import (
    ROWS,
    absolute,
    fma,
    half,
    inlined,
    least,
    load,
    most,
    part,
    rint,
    splat,
    where_less,
)

Floats = NDArray[np.float32]

STEPS = 15
"""Steps between the levels of a table; tables with fewer are padded by steps of 0 at infinity."""


@part
def fill(tile: Floats, weight: Floats, row: int, column: int, columns: int) -> None:
    """Take up to 16 rows from ``row`` on; rows past the end are zeros."""
    for lane in range(ROWS):
        if row + lane < weight.shape[0]:
            for c in range(columns):
                tile[c * ROWS + lane] = weight[row + lane, column + c]
        else:
            for c in range(columns):
                tile[c * ROWS + lane] = 0.0


@inlined
def inverse(scale: Any) -> Any:
    """1 / scale; 0 where that would be infinite."""
    return where_less(splat(1e-37), absolute(scale), 1.0 / scale, splat(0.0))


@inlined
def ratio(numerator: Any, denominator: Any) -> Any:
    """numerator / denominator, 0 unless the denominator is positive."""
    return where_less(splat(0.0), denominator, numerator / denominator, splat(0.0))


@inlined
def nonzero_half(value: Any) -> Any:
    """The nearest float16, or the smallest one with the sign of the value: even that scale may code something."""
    rounded = half(least(most(value, splat(-HALF_MAX)), splat(HALF_MAX)))
    smallest = where_less(value, splat(0.0), splat(-HALF_TINY), splat(HALF_TINY))
    return where_less(splat(0.0), absolute(rounded), rounded, smallest)


@inlined
def moments(tile: Floats, h: Floats, start: int, stop: int) -> tuple[Any, Any, Any]:
    """sum h, sum h x and sum h x^2 of the columns from start to stop."""
    total, dot, energy = splat(0.0), splat(0.0), splat(0.0)
    for c in range(start, stop):
        x = load(tile, c * ROWS)
        total, dot, energy = total + h[c], fma(splat(h[c]), x, dot), fma(h[c] * x, x, energy)
    return total, dot, energy


@inlined
def range_of(tile: Floats, h: Floats, start: int, stop: int, center: Any, negligible: Any) -> tuple[Any, Any, Any]:
    """Least and largest weight, and the one farthest from 0, of those whose h (x - center)^2 is more than
    ``negligible``; the center if there are none."""
    low, high, reach = center, center, center
    for c in range(start, stop):
        x = load(tile, c * ROWS)
        away = x - center
        x = where_less(negligible, h[c] * away * away, x, center)
        low, high = least(low, x), most(high, x)
        reach = where_less(absolute(reach), absolute(x), x, reach)
    return low, high, reach


@inlined
def measure(
    tile: Floats, h: Floats, start: int, stop: int, scale: Any, to_levels: Any, low: float, high: float, table: Floats
) -> tuple[Any, Any, Any]:
    """A, B, C of the columns on ``scale``, whose inverse is ``to_levels``.

    Levels are the integers from low to high, or, if ``table`` has entries, low plus its steps: table[i] is where step i
    begins (in units of the scale), table[15 + i] its height.
    """
    a, b, c = splat(0.0), splat(0.0), splat(0.0)
    negative, bottom, top = 0.0 - scale, splat(low), splat(high)
    if table.size == 0:
        for column in range(start, stop):
            x = load(tile, column * ROWS)
            level = least(most(rint(x * to_levels), bottom), top)
            residual = fma(negative, level, x)
            weighted = h[column] * residual
            a, b, c = fma(weighted, residual, a), fma(weighted, level, b), fma(h[column] * level, level, c)
    else:
        for column in range(start, stop):
            x = load(tile, column * ROWS)
            level = level_of_table(x * to_levels, bottom, table)
            residual = fma(negative, level, x)
            weighted = h[column] * residual
            a, b, c = fma(weighted, residual, a), fma(weighted, level, b), fma(h[column] * level, level, c)
    return a, b, c


@inlined
def level_of_table(x: Any, bottom: Any, table: Floats) -> Any:
    """The level nearest to x."""
    level = bottom
    for step in range(STEPS):
        level = where_less(splat(table[step]), x, level + table[STEPS + step], level)
    return level


@inlined
def measure_pair(
    tile: Floats, h: Floats, start: int, stop: int, scale: Any, to_levels: Any, offset: Any, high: float
) -> tuple[Any, Any, Any, Any, Any]:
    """A, B, C, D, F of the columns on scale, whose inverse is ``to_levels``, and offset. Levels are the integers from 0
    to high."""
    a, b, c, d, f = splat(0.0), splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    negative, bottom, top = 0.0 - scale, splat(0.0), splat(high)
    for column in range(start, stop):
        x = load(tile, column * ROWS) - offset
        level = least(most(rint(x * to_levels), bottom), top)
        residual = fma(negative, level, x)
        weighted, weighted_level = h[column] * residual, h[column] * level
        a, b, f = fma(weighted, residual, a), fma(weighted, level, b), f + weighted
        c, d = fma(weighted_level, level, c), d + weighted_level
    return a, b, c, d, f
