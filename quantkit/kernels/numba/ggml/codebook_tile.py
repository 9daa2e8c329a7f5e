"""One block of sixteen rows in a search for types with a codebook, and the error of its groups on given scales."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quantkit.kernels.numba.ggml.eights import least_error_of_eights, nearest_eight
from quantkit.kernels.numba.ggml.vectors import (
    EVEN,
    SHIFTED,
    SHIFTED_TOGETHER,
    Book,
    Floats,
    aligned,
    flip,
    least_error,
    nearest,
)
from quantkit.kernels.numba.lanes import ROWS, least, load, splat, store

BLOCK, MOST_GROUPS = 256, 16
TRIALS = 13
"""Scales on which each group is measured."""
LEAST_IMPORTANCE = np.float32(1e-10)
"""Beside the highest of the block: weights without any are stored sensibly where that costs the others nothing."""


class Found(NamedTuple):
    """What is stored. d (rows, blocks) float32, a float16 value; sub (rows, blocks, groups) uint8: m; codes (rows,
    blocks, 256 / width) int16: codewords, those of a shift down behind those of a shift up; signs (rows, blocks, 32)
    uint8, bit i for weight i of 8, zeros where levels have signs themselves."""

    d: Floats
    sub: NDArray[np.uint8]
    codes: NDArray[np.int16]
    signs: NDArray[np.uint8]


class Tile(NamedTuple):
    """One block of sixteen rows. weight (256 * 16,): divided by ``power`` (16,) of two; value: magnitudes, wrong signs
    as minus, or weights less a shift; h (256,): importance divided by its maximum. Of groups (16 * 16,): unit: the
    scale that trials are multiples of; zero: error of zeros; likely: the best trial scale; m; curve
    (16 * TRIALS * 16,): errors on trials. least (16,): error of what is kept. Of the codes at hand: codes (64 * 16,),
    flipped (32 * 16,) int64, the weight of the wrong sign or which shift; error (16,) of 8 weights; product, square
    (16,): of the least squares."""

    weight: Floats
    value: Floats
    h: Floats
    power: Floats
    unit: Floats
    zero: Floats
    likely: Floats
    m: Floats
    curve: Floats
    least: Floats
    codes: NDArray[np.int64]
    flipped: NDArray[np.int64]
    error: Floats
    d: Floats
    product: Floats
    square: Floats


@njit(cache=True, nogil=True)
def make_tile() -> Tile:
    """Room to work, mostly uninitialised."""
    groups = MOST_GROUPS * ROWS
    return Tile(
        aligned(BLOCK * ROWS),
        aligned(BLOCK * ROWS),
        aligned(BLOCK),
        aligned(ROWS),
        aligned(groups),
        aligned(groups),
        aligned(groups),
        aligned(groups),
        aligned(groups * TRIALS),
        aligned(ROWS),
        np.zeros(64 * ROWS, np.int64),
        np.zeros(32 * ROWS, np.int64),
        aligned(ROWS),
        aligned(ROWS),
        aligned(ROWS),
        aligned(ROWS),
    )


@njit(cache=True, nogil=True)
def fill(tile: Tile, weight: Floats, importance: Floats) -> bool:
    """Take up to 16 rows of a block; rows past the end are zeros. Returns whether any weight is not zero."""
    anything = False
    for lane in range(ROWS):
        reach = np.float32(0)
        if lane < weight.shape[0]:
            for c in range(BLOCK):
                reach = max(reach, abs(weight[lane, c]))
        anything = anything or bool(reach > 0)
        tile.power[lane] = 2.0 ** np.floor(np.log2(np.float64(reach))) if reach > 0 else 1.0
        inverse = 1 / np.float64(tile.power[lane])
        for c in range(BLOCK):
            tile.weight[c * ROWS + lane] = weight[lane, c] * inverse if reach > 0 else 0.0
    most_important = np.float64(importance.max())
    for c in range(BLOCK):
        tile.h[c] = max(importance[c] / most_important, LEAST_IMPORTANCE) if most_important > 0 else 1.0
    for i in range(BLOCK * ROWS):
        tile.value[i] = abs(tile.weight[i])
    return anything


@njit(cache=True, nogil=True)
def flip_group(book: Book, tile: Tile, room: Floats, g: int, scale: Any) -> None:
    """Decide on a scale near ``scale`` which weights of a group have the wrong sign."""
    if book.signs == EVEN:
        columns = g * book.group, (g + 1) * book.group
        flip(book.levels, tile.weight, tile.h, columns, scale, 0, room, tile.value)


@njit(inline="always")
def shift_columns(tile: Tile, columns: tuple[int, int], amount: Any) -> None:
    """Weights less the shift of their levels, into ``value``."""
    for c in range(columns[0], columns[1]):
        store(tile.value, c * ROWS, load(tile.weight, c * ROWS) - amount)


@njit(inline="always")
def _error(book: Book, tile: Tile, room: Floats, columns: tuple[int, int], scale: Any) -> Any:
    if book.order.size == 8:
        return least_error_of_eights(book.levels, book.order, book.places, tile.value, tile.h, columns, scale, room)
    return least_error(book.levels, book.order, book.places, tile.value, tile.h, columns, scale, room)


@njit(inline="always")
def errors_of_shifts(book: Book, tile: Tile, room: Floats, columns: tuple[int, int], scale: Any) -> tuple[Any, Any]:
    """Error of some columns with all levels shifted up, and down."""
    shift_columns(tile, columns, scale * book.shift)
    up = _error(book, tile, room, columns, scale)
    shift_columns(tile, columns, 0.0 - scale * book.shift)
    return up, _error(book, tile, room, columns, scale)


@njit(cache=True, nogil=True)
def group_error(book: Book, tile: Tile, room: Floats, g: int, scale: Any) -> Any:
    """Error of a group's nearest codewords."""
    start, stop = g * book.group, (g + 1) * book.group
    if book.signs < SHIFTED:
        return _error(book, tile, room, (start, stop), scale)
    total, width = splat(0.0), stop - start if book.signs == SHIFTED_TOGETHER else 8
    for column in range(start, stop, width):
        up, down = errors_of_shifts(book, tile, room, (column, column + width), scale)
        total = total + least(up, down)
    return total


@njit(inline="always")
def code_eight(book: Book, tile: Tile, room: Floats, column: int, scale: Any) -> None:
    """The nearest codewords of the values of 8 columns, into the room."""
    if book.order.size == 8:
        nearest_eight(book.levels, book.order, book.places, tile.value, tile.h, column, scale, room)
    else:
        nearest(book.levels, book.order, book.places, tile.value, tile.h, column, scale, room)
