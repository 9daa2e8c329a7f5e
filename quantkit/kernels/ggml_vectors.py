"""Exact search of the nearest codeword, sixteen rows at a time: what IQ3_XXS and IQ3_S blocks are coded by.

A codeword is 4 magnitudes out of 8 levels. The cost of each level is tabulated for each of 4 weights, costs of the
first two and of the last two are added for all 64 pairs of levels; then a codeword costs one more sum, and those that
share the first pair of levels are taken four at a time. Two vectors (8 weights) are searched together.

A tile is a flat (256 * 16,) float32: weight of column c and row r at 16 c + r; importance belongs to columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quantkit.kernels.ggml_lanes import ROWS, absolute, fma, least, load, most, splat, store, where_less

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

TABLE = 64 * ROWS
"""Entries of the table of one pair of weights."""
INFINITY = np.float32(np.inf)


class Book(NamedTuple):
    """A codebook as the search wants it. Positions of a vector are permuted by ``order``: the first two are the pair
    that codewords are grouped by.

    levels (8,) float32, rising; grid (codewords, 4) float32, permuted; places in tables: ``first`` (chunks,), ``second``
    (chunks, 4); ``code`` (chunks, 4): the codewords; order (4,); unit: scale of d; even: whether each 8 weights have an
    even number of minus signs (IQ3_XXS).
    """

    levels: Floats
    grid: Floats
    first: Integers
    second: Integers
    code: Integers
    order: Integers
    unit: np.float32
    even: bool


class Tables(NamedTuple):
    """Room for the search of two vectors: cost (16 * 16,) of levels; first, second (2 * TABLE,); error, chunk (2 * 16,)
    of the nearest codewords; increase (8 * 16,) of the cost by a wrong sign."""

    cost: Floats
    first: Floats
    second: Floats
    error: Floats
    chunk: Floats
    increase: Floats


@njit(cache=True, nogil=True)
def make_tables() -> Tables:
    """Room, uninitialised."""
    return Tables(
        np.empty(16 * ROWS, np.float32),
        np.empty(2 * TABLE, np.float32),
        np.empty(2 * TABLE, np.float32),
        np.empty(2 * ROWS, np.float32),
        np.empty(2 * ROWS, np.float32),
        np.empty(8 * ROWS, np.float32),
    )


@njit(cache=True, nogil=True)
def _pair_costs(
    book: Book, value: Floats, h: Floats, columns: tuple[int, int], negative: Any, cost: Floats, out: Floats, start: int
) -> None:
    """Costs of all pairs of levels of two columns into ``out`` from ``start``. ``negative``: minus the scale."""
    for half in range(2):
        x, share = load(value, columns[half] * ROWS), splat(h[columns[half]])
        for level in range(8):
            miss = fma(negative, splat(book.levels[level]), x)
            store(cost, (half * 8 + level) * ROWS, share * miss * miss)
    for i in range(8):
        left = load(cost, i * ROWS)
        for j in range(8):
            store(out, start + (i * 8 + j) * ROWS, left + load(cost, (8 + j) * ROWS))


@njit(cache=True, nogil=True)
def _tabulate(book: Book, value: Floats, h: Floats, column: int, scale: Any, tables: Tables) -> None:
    negative, order = 0.0 - scale, book.order
    for v in range(2):
        c = column + 4 * v
        _pair_costs(book, value, h, (c + order[0], c + order[1]), negative, tables.cost, tables.first, v * TABLE)
        _pair_costs(book, value, h, (c + order[2], c + order[3]), negative, tables.cost, tables.second, v * TABLE)


@njit(cache=True, nogil=True)
def _best_of_chunk(book: Book, chunk: int, tables: Tables, start: int) -> Any:
    second = tables.second
    left = least(load(second, start + book.second[chunk, 0]), load(second, start + book.second[chunk, 1]))
    right = least(load(second, start + book.second[chunk, 2]), load(second, start + book.second[chunk, 3]))
    return least(left, right) + load(tables.first, start + book.first[chunk])


@njit(cache=True, nogil=True)
def least_error(book: Book, value: Floats, h: Floats, column: int, scale: Any, tables: Tables) -> Any:
    """The error of the nearest codewords of 8 columns from ``column`` on, on ``scale``."""
    _tabulate(book, value, h, column, scale, tables)
    error_0, error_1 = splat(INFINITY), splat(INFINITY)
    for chunk in range(book.first.shape[0]):
        error_0 = least(_best_of_chunk(book, chunk, tables, 0), error_0)
        error_1 = least(_best_of_chunk(book, chunk, tables, TABLE), error_1)
    return error_0 + error_1


@njit(cache=True, nogil=True)
def nearest(book: Book, value: Floats, h: Floats, column: int, scale: Any, tables: Tables) -> Any:
    """As `least_error`; errors and chunks of the nearest codewords go into the tables. Of equals, the first."""
    _tabulate(book, value, h, column, scale, tables)
    error_0, error_1 = splat(INFINITY), splat(INFINITY)
    chunk_0, chunk_1 = splat(0.0), splat(0.0)
    for chunk in range(book.first.shape[0]):
        number = splat(np.float32(chunk))
        error = _best_of_chunk(book, chunk, tables, 0)
        chunk_0, error_0 = where_less(error, error_0, number, chunk_0), least(error, error_0)
        error = _best_of_chunk(book, chunk, tables, TABLE)
        chunk_1, error_1 = where_less(error, error_1, number, chunk_1), least(error, error_1)
    store(tables.chunk, 0, chunk_0)
    store(tables.chunk, ROWS, chunk_1)
    store(tables.error, 0, error_0 + error_1)
    return error_0 + error_1


@njit(cache=True, nogil=True)
def nearest_code(book: Book, tables: Tables, v: int, lane: int) -> int:
    """The codeword that `nearest` found for vector 0 or 1 of one row."""
    chunk, which, at = int(tables.chunk[v * ROWS + lane]), 0, v * TABLE + lane
    for other in range(1, 4):
        if tables.second[at + book.second[chunk, other]] < tables.second[at + book.second[chunk, which]]:
            which = other
    return book.code[chunk, which]


@njit(cache=True, nogil=True)
def flip(book: Book, tile: Floats, h: Floats, column: int, scale: Any, rank: int, tables: Tables, value: Floats) -> Any:
    """Magnitudes of 8 columns into ``value``. In rows where the number of negative weights is odd, one keeps a minus:
    that whose wrong sign costs least (``rank`` 0), second least (1)... by a free choice of levels. Returns its index,
    or 8 where no sign is wrong."""
    low, high, parity, zero = book.levels[0] * scale, book.levels[7] * scale, splat(1.0), splat(0.0)
    for i in range(8):
        x = load(tile, (column + i) * ROWS)
        at = absolute(x)
        parity = where_less(x, zero, zero - parity, parity)
        wrong, below, above = at + low, most(low - at, zero), most(at - high, zero)
        store(tables.increase, i * ROWS, h[column + i] * (wrong * wrong - below * below - above * above))
    choice = splat(8.0)
    for _ in range(rank + 1):
        choice, smallest = splat(8.0), splat(INFINITY)
        for i in range(8):
            increase = load(tables.increase, i * ROWS)
            choice = where_less(increase, smallest, splat(np.float32(i)), choice)
            smallest = least(increase, smallest)
        for i in range(8):
            taken = absolute(choice - np.float32(i))
            increase = load(tables.increase, i * ROWS)
            store(tables.increase, i * ROWS, where_less(taken, splat(0.5), splat(INFINITY), increase))
    choice = where_less(parity, zero, choice, splat(8.0))
    for i in range(8):
        at = absolute(load(tile, (column + i) * ROWS))
        store(value, (column + i) * ROWS, where_less(absolute(choice - np.float32(i)), splat(0.5), zero - at, at))
    return choice
