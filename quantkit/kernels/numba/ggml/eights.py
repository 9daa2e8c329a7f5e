"""Exact search of the nearest codeword of 8 weights out of 3 levels (IQ2, IQ1), as `vectors` does it for those of 4.

Costs of the 9 pairs of levels of each two weights are added to costs of the 81 choices for each half of a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quantkit.kernels.numba.ggml.vectors import (
    CHUNK,
    ERROR,
    FIRST,
    INFINITY,
    SECOND,
    Floats,
    Integers,
    best_of_chunk,
)
from quantkit.kernels.numba.lanes import ROWS, fma, least, load, splat, store, where_less


@njit(inline="always")
def _pair_costs(levels: Floats, value: Floats, h: Floats, left: int, right: int, negative: Any, room: Floats, at: int):
    """Costs of the 9 pairs of levels of two columns, to ``at``. ``negative``: minus the scale."""
    x, y, h_x, h_y = load(value, left * ROWS), load(value, right * ROWS), splat(h[left]), splat(h[right])
    for i in range(3):
        miss = fma(negative, splat(levels[i]), x)
        cost = h_x * miss * miss
        for j in range(3):
            miss = fma(negative, splat(levels[j]), y)
            store(room, at + (3 * i + j) * ROWS, fma(h_y * miss, miss, cost))


@njit(inline="always")
def _half_costs(
    levels: Floats,
    order: Integers,
    value: Floats,
    h: Floats,
    column: int,
    half: int,
    negative: Any,
    room: Floats,
    start: int,
):
    """Costs of the 81 choices for one half of a vector, to ``start``."""
    first = 4 * half
    for pair in range(2):
        left, right = column + order[first + 2 * pair], column + order[first + 2 * pair + 1]
        _pair_costs(levels, value, h, left, right, negative, room, 9 * pair * ROWS)
    for i in range(9):
        cost = load(room, i * ROWS)
        for j in range(9):
            store(room, start + (9 * i + j) * ROWS, cost + load(room, (9 + j) * ROWS))


@njit(inline="always")
def _tabulate(levels: Floats, order: Integers, value: Floats, h: Floats, column: int, scale: Any, room: Floats):
    """The tables of 8 columns."""
    negative = 0.0 - scale
    _half_costs(levels, order, value, h, column, 0, negative, room, FIRST)
    _half_costs(levels, order, value, h, column, 1, negative, room, SECOND)


@njit(cache=True, nogil=True)
def least_error_of_eights(
    levels: Floats,
    order: Integers,
    places: Integers,
    value: Floats,
    h: Floats,
    columns: tuple[int, int],
    scale: Any,
    room: Floats,
) -> Any:
    """As `vectors.least_error`; the number of chunks is even."""
    total = splat(0.0)
    for column in range(columns[0], columns[1], 8):
        _tabulate(levels, order, value, h, column, scale, room)
        error_0, error_1 = splat(INFINITY), splat(INFINITY)
        for chunk in range(0, places.shape[0], 2):
            error_0 = least(best_of_chunk(places, chunk, room, 0), error_0)
            error_1 = least(best_of_chunk(places, chunk + 1, room, 0), error_1)
        total = total + least(error_0, error_1)
    return total


@njit(cache=True, nogil=True)
def nearest_eight(
    levels: Floats,
    order: Integers,
    places: Integers,
    value: Floats,
    h: Floats,
    column: int,
    scale: Any,
    room: Floats,
) -> None:
    """As `vectors.nearest`: error and chunk of the nearest codeword into the room."""
    _tabulate(levels, order, value, h, column, scale, room)
    smallest, found = splat(INFINITY), splat(0.0)
    for chunk in range(places.shape[0]):
        error = best_of_chunk(places, chunk, room, 0)
        found, smallest = where_less(error, smallest, splat(np.float32(chunk)), found), least(error, smallest)
    store(room, CHUNK, found)
    store(room, ERROR, smallest)
