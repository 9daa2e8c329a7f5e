"""Exact search of the nearest codeword, sixteen rows at a time: what blocks of the types with a codebook are coded by.

A codeword of the IQ3 types is 4 magnitudes out of 8 levels. The cost of each level is tabulated for each of 4 weights,
costs of the first two and of the last two are added for all 64 pairs of levels; then a codeword costs one more sum, and
those that share the first pair of levels are taken four at a time. Two vectors (8 weights) are searched together.
Codewords of 8 (IQ2, IQ1) go the same way in `eights`.

A tile is a flat (256 * 16,) float32: weight of column c and row r at 16 c + r; importance belongs to columns. The
functions take arrays one by one, and what runs inside of loops is inlined by numba: handing an array to a function, or
taking it out of a tuple, counts its references, which costs as much as a search.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quantkit.kernels.numba.lanes import ROWS, absolute, fma, least, load, most, splat, store, where_less

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

TABLE = 81 * ROWS
"""Entries of the table of one half of a vector: 8 levels of 2 weights, or 3 levels of 4."""
FIRST = 18 * ROWS
SECOND = FIRST + 2 * TABLE
ERROR = SECOND + 2 * TABLE
CHUNK = ERROR + ROWS
FLIPPED = CHUNK + 2 * ROWS
INCREASE = FLIPPED + ROWS
ROOM = INCREASE + 8 * ROWS
"""Where things lie in the room to work: costs of levels (2 * 8 * 16), or of pairs of them (2 * 9 * 16), at 0, tables of
the first and the second half of up to two vectors, error of 8 weights, chunks of their nearest codewords, index of the
wrong sign (or which shift), and what each wrong sign would cost."""
INFINITY = np.float32(np.inf)
FREE, EVEN, SHIFTED, SHIFTED_TOGETHER = range(4)
"""What belongs to each 8 weights beside codewords: 8 signs; 8 signs of which an even number are minus; a shift of
all levels up or down; the same, but one for a whole group."""


class Book(NamedTuple):
    """A codebook as the search wants it. Positions of a vector are permuted by ``order``: the first half is what
    codewords are grouped by.

    levels (8 or 3,) float32, rising; grid (codewords, width) float32, permuted; places (chunks, 5): of the first half
    and of four second halves in their tables; code (chunks, 4): the codewords; order (width,); unit: scale of d; signs:
    FREE, EVEN...; shift: by which levels are shifted, 0 unless SHIFTED; group: weights of a scale; top: the highest m
    of a scale d (2 m + 1); lowest, step: the first trial scale, and from one to the next, in units of that which maps
    the largest weight to the highest level.
    """

    levels: Floats
    grid: Floats
    places: Integers
    code: Integers
    order: Integers
    unit: np.float32
    signs: int
    shift: np.float32
    group: int
    top: int
    lowest: np.float32
    step: np.float32


@njit(cache=True, nogil=True)
def aligned(size: int) -> Floats:
    """Uninitialised float32 that begin at a multiple of 64 bytes: lanes that cross cache lines cost twice."""
    array = np.empty(size + ROWS, np.float32)
    start = -(array.ctypes.data // 4) % ROWS
    return array[start : start + size]


@njit(inline="always")
def _pair_costs(
    levels: Floats, value: Floats, h: Floats, left: int, right: int, negative: Any, room: Floats, start: int
) -> None:
    """Costs of all pairs of levels of two columns, to ``start``. ``negative``: minus the scale."""
    x, y = load(value, left * ROWS), load(value, right * ROWS)
    h_x, h_y = splat(h[left]), splat(h[right])
    for level in range(8):
        miss = fma(negative, splat(levels[level]), x)
        store(room, level * ROWS, h_x * miss * miss)
        miss = fma(negative, splat(levels[level]), y)
        store(room, (8 + level) * ROWS, h_y * miss * miss)
    for i in range(8):
        cost = load(room, i * ROWS)
        for j in range(8):
            store(room, start + (i * 8 + j) * ROWS, cost + load(room, (8 + j) * ROWS))


@njit(inline="always")
def _tabulate(levels: Floats, order: Integers, value: Floats, h: Floats, column: int, scale: Any, room: Floats) -> None:
    """The tables of 8 columns."""
    negative = 0.0 - scale
    for v in range(2):
        c = column + 4 * v
        _pair_costs(levels, value, h, c + order[0], c + order[1], negative, room, FIRST + v * TABLE)
        _pair_costs(levels, value, h, c + order[2], c + order[3], negative, room, SECOND + v * TABLE)


@njit(inline="always")
def best_of_chunk(places: Integers, chunk: int, room: Floats, vector: int) -> Any:
    """The least error of four codewords."""
    at = SECOND + vector * TABLE
    left = least(load(room, at + places[chunk, 1]), load(room, at + places[chunk, 2]))
    right = least(load(room, at + places[chunk, 3]), load(room, at + places[chunk, 4]))
    return least(left, right) + load(room, FIRST + vector * TABLE + places[chunk, 0])


@njit(cache=True, nogil=True)
def least_error(
    levels: Floats,
    order: Integers,
    places: Integers,
    value: Floats,
    h: Floats,
    columns: tuple[int, int],
    scale: Any,
    room: Floats,
) -> Any:
    """The error of the nearest codewords of columns[0] to columns[1], on ``scale``."""
    total = splat(0.0)
    for column in range(columns[0], columns[1], 8):
        _tabulate(levels, order, value, h, column, scale, room)
        error_0, error_1 = splat(INFINITY), splat(INFINITY)
        for chunk in range(places.shape[0]):
            error_0 = least(best_of_chunk(places, chunk, room, 0), error_0)
            error_1 = least(best_of_chunk(places, chunk, room, 1), error_1)
        total = total + (error_0 + error_1)
    return total


@njit(cache=True, nogil=True)
def nearest(
    levels: Floats,
    order: Integers,
    places: Integers,
    value: Floats,
    h: Floats,
    column: int,
    scale: Any,
    room: Floats,
) -> None:
    """The nearest codewords of 8 columns from ``column`` on: their error, and the chunks that they are in, into the
    room. Of equals, the first."""
    _tabulate(levels, order, value, h, column, scale, room)
    error_0, error_1 = splat(INFINITY), splat(INFINITY)
    chunk_0, chunk_1 = splat(0.0), splat(0.0)
    for chunk in range(places.shape[0]):
        number = splat(np.float32(chunk))
        error = best_of_chunk(places, chunk, room, 0)
        chunk_0, error_0 = where_less(error, error_0, number, chunk_0), least(error, error_0)
        error = best_of_chunk(places, chunk, room, 1)
        chunk_1, error_1 = where_less(error, error_1, number, chunk_1), least(error, error_1)
    store(room, CHUNK, chunk_0)
    store(room, CHUNK + ROWS, chunk_1)
    store(room, ERROR, error_0 + error_1)


@njit(inline="always")
def nearest_code(places: Integers, code: Integers, room: Floats, vector: int, lane: int) -> int:
    """The codeword that `nearest` found for vector 0 or 1 of one row."""
    chunk, which, at = int(room[CHUNK + vector * ROWS + lane]), 0, SECOND + vector * TABLE + lane
    for other in range(1, 4):
        if room[at + places[chunk, 1 + other]] < room[at + places[chunk, 1 + which]]:
            which = other
    return code[chunk, which]


@njit(cache=True, nogil=True)
def flip(
    levels: Floats,
    tile: Floats,
    h: Floats,
    columns: tuple[int, int],
    scale: Any,
    rank: int,
    room: Floats,
    value: Floats,
) -> None:
    """Magnitudes of columns[0] to columns[1] into ``value``. In rows where the number of negative weights of 8 is odd,
    one keeps a minus: that whose wrong sign costs least (``rank`` 0), second least (1)... by a free choice of levels.
    Its index of the last 8, or 8 where no sign is wrong, goes into the room."""
    low, high, zero = levels[0] * scale, levels[levels.size - 1] * scale, splat(0.0)
    for column in range(columns[0], columns[1], 8):
        parity = splat(1.0)
        for i in range(8):
            x = load(tile, (column + i) * ROWS)
            at = absolute(x)
            parity = where_less(x, zero, zero - parity, parity)
            wrong, below, above = at + low, most(low - at, zero), most(at - high, zero)
            store(room, INCREASE + i * ROWS, h[column + i] * (wrong * wrong - below * below - above * above))
        choice = splat(8.0)
        for again in range(rank + 1):
            if again:
                for i in range(8):
                    place, number = INCREASE + i * ROWS, np.float32(i)
                    increase = load(room, place)
                    store(room, place, where_less(absolute(choice - number), splat(0.5), splat(INFINITY), increase))
            choice, smallest = splat(8.0), splat(INFINITY)
            for i in range(8):
                increase = load(room, INCREASE + i * ROWS)
                choice = where_less(increase, smallest, splat(np.float32(i)), choice)
                smallest = least(increase, smallest)
        choice = where_less(parity, zero, choice, splat(8.0))
        for i in range(8):
            at = absolute(load(tile, (column + i) * ROWS))
            wrong = absolute(choice - np.float32(i))
            store(value, (column + i) * ROWS, where_less(wrong, splat(0.5), zero - at, at))
        store(room, FLIPPED, choice)
