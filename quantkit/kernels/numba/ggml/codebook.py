"""Search for the scales of IQ3_XXS and IQ3_S blocks, sixteen rows at a time.

    weight ~ sign * scale * codeword          scale = step * (2 m + 1), one for each group of 32; step = unit * d

For a block of 256: the error of each group on a few trial scales; the d whose multiples suit all groups best (from
those errors, interpolated); the neighbouring multiples by their real error; then codewords and signs, d refitted to
them by least squares, and codewords and signs again. What has the least real error is kept, zeros included.
All of it is arithmetic on lanes (`ggml_lanes`): row r of the tile in lane r.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quantkit.kernels.numba.ggml.vectors import (
    ERROR,
    FLIPPED,
    INFINITY,
    ROOM,
    Book,
    Floats,
    aligned,
    flip,
    least_error,
    nearest,
    nearest_code,
)
from quantkit.kernels.numba.lanes import ROWS, absolute, fma, half, least, load, most, rint, splat, store, where_less

BLOCK, GROUP, GROUPS = 256, 32, 8
TRIALS = 13
"""Scales on which each group is measured..."""
LOWEST, TRIAL_STEP = np.float32(0.6), np.float32(0.065)
"""...from LOWEST times the scale that maps its largest magnitude to the highest level, in steps of TRIAL_STEP."""
DS = 16
FIRST_D, D_STEP = np.float32(29.0), np.float32(0.25)
"""Candidates of d give the largest scale a multiple (2 m + 1) of 29, 29.25... (31 is the highest)."""
FLIPS = 3
"""Weights of eight that are tried with the wrong sign, where there must be one (IQ3_XXS)."""
HALF_MAX = np.float32(65504.0)
LEAST_REACH = np.float32(1e-6)
"""Size of a group of zeros, beside the largest weight of the block: its scale has some size, too."""
LEAST_IMPORTANCE = np.float32(1e-10)
"""Beside the highest of the block: weights without any are stored sensibly where that costs the others nothing."""


class Found(NamedTuple):
    """What is stored. d (rows, blocks) float32, a float16 value; sub (rows, blocks, 8) uint8: m; codes (rows, blocks,
    64) int16; signs (rows, blocks, 32) uint8, bit i for weight i of 8."""

    d: Floats
    sub: NDArray[np.uint8]
    codes: NDArray[np.int16]
    signs: NDArray[np.uint8]


class Tile(NamedTuple):
    """One block of sixteen rows. weight (256 * 16,): divided by ``power`` (16,) of two; value: magnitudes, wrong signs
    as minus; h (256,): importance divided by its maximum. Of groups (8 * 16,): unit: the scale that trials are
    multiples of; zero: error of zeros; likely: the best trial scale; m; curve (8 * TRIALS * 16,): errors on trials.
    least (16,): error of what is kept. Of the codes at hand: codes, flipped (64 * 16,), (32 * 16,) int64; error (16,)
    of one pair of vectors; product, square (16,): of the least squares."""

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
    groups = GROUPS * ROWS
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
def search_rows(book: Book, weight: Floats, importance: Floats, rows: tuple[int, int], found: Found) -> None:
    """weight (out, in) finite, importance (in,) >= 0: fill rows[0] to rows[1] of ``found``, zeros before."""
    tile, room = make_tile(), aligned(ROOM)
    for row in range(rows[0], rows[1], ROWS):
        for b in range(weight.shape[1] // BLOCK):
            columns = slice(b * BLOCK, (b + 1) * BLOCK)
            if not _fill(tile, weight[row : rows[1], columns], importance[columns]):
                continue
            _measure(book, tile, room)
            step = _rounded(book, tile, _best_step(book, tile))
            _try_neighbours(book, tile, room, step)
            _encode(book, tile, room, step, 1, found, row, rows[1], b)
            step = _rounded(book, tile, _refitted(tile))
            _encode(book, tile, room, step, FLIPS if book.even else 1, found, row, rows[1], b)


@njit(cache=True, nogil=True)
def _fill(tile: Tile, weight: Floats, importance: Floats) -> bool:
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
def _group_error(book: Book, tile: Tile, room: Floats, g: int, scale: Any) -> Any:
    """Error of a group's nearest codewords."""
    columns = g * GROUP, (g + 1) * GROUP
    return least_error(book.levels, book.order, book.places, tile.value, tile.h, columns, scale, room)


@njit(cache=True, nogil=True)
def _flip_group(book: Book, tile: Tile, room: Floats, g: int, scale: Any) -> None:
    if book.even:
        flip(book.levels, tile.weight, tile.h, (g * GROUP, (g + 1) * GROUP), scale, 0, room, tile.value)


@njit(cache=True, nogil=True)
def _measure(book: Book, tile: Tile, room: Floats) -> None:
    """The curve of each group, its unit, its likely scale and its error of zeros."""
    total = splat(0.0)
    for g in range(GROUPS):
        reach, zero = splat(LEAST_REACH), splat(0.0)
        for c in range(g * GROUP, (g + 1) * GROUP):
            x = absolute(load(tile.weight, c * ROWS))
            reach, zero = most(reach, x), zero + tile.h[c] * x * x
        unit, best, likely = reach / book.levels[7], splat(INFINITY), splat(0.0)
        _flip_group(book, tile, room, g, unit)
        for trial in range(TRIALS):
            scale = unit * (LOWEST + TRIAL_STEP * np.float32(trial))
            error = _group_error(book, tile, room, g, scale)
            store(tile.curve, (g * TRIALS + trial) * ROWS, error)
            likely, best = where_less(error, best, scale, likely), least(error, best)
        store(tile.unit, g * ROWS, unit)
        store(tile.zero, g * ROWS, zero)
        store(tile.likely, g * ROWS, likely)
        total = total + zero
    store(tile.least, 0, total)


@njit(cache=True, nogil=True)
def _expected(tile: Tile, g: int, scale: Any) -> Any:
    """Error of a group on any scale, from its curve: linear between trials and down to zero, quadratic above."""
    unit, zero = load(tile.unit, g * ROWS), load(tile.zero, g * ROWS)
    place = (scale / unit - LOWEST) / TRIAL_STEP
    inside = splat(0.0)
    for trial in range(TRIALS):
        share = most(1.0 - absolute(place - np.float32(trial)), splat(0.0))
        inside = fma(share, load(tile.curve, (g * TRIALS + trial) * ROWS), inside)
    first, last = load(tile.curve, g * TRIALS * ROWS), load(tile.curve, (g * TRIALS + TRIALS - 1) * ROWS)
    below = zero + (first - zero) * scale / (unit * LOWEST)
    ratio = scale / (unit * (LOWEST + TRIAL_STEP * np.float32(TRIALS - 1)))
    result = where_less(place, splat(0.0), below, inside)
    return where_less(splat(np.float32(TRIALS - 1)), place, last * ratio * ratio, result)


@njit(cache=True, nogil=True)
def _multiple(tile: Tile, g: int, step: Any) -> tuple[Any, Any]:
    """The better of the two odd multiples of ``step`` beside the likely scale of a group: m and the error expected."""
    m = rint((load(tile.likely, g * ROWS) / step - 2.0) * 0.5)
    m = least(most(m, splat(0.0)), splat(14.0))
    lower, upper = _expected(tile, g, step * (m * 2.0 + 1.0)), _expected(tile, g, step * (m * 2.0 + 3.0))
    return where_less(upper, lower, m + 1.0, m), least(upper, lower)


@njit(cache=True, nogil=True)
def _best_step(book: Book, tile: Tile) -> Any:
    """The step = unit * d that is expected to suit the block best, with multiples in ``m``."""
    largest = splat(0.0)
    for g in range(GROUPS):
        largest = most(largest, load(tile.likely, g * ROWS))
    best, smallest = splat(0.0), splat(INFINITY)
    for trial in range(DS):
        step = _rounded(book, tile, largest / (FIRST_D + D_STEP * np.float32(trial)))
        total = splat(0.0)
        for g in range(GROUPS):
            total = total + _multiple(tile, g, step)[1]
        best, smallest = where_less(total, smallest, step, best), least(total, smallest)
    for g in range(GROUPS):
        store(tile.m, g * ROWS, _multiple(tile, g, best)[0])
    return best


@njit(cache=True, nogil=True)
def _half_of(book: Book, tile: Tile, step: Any) -> Any:
    """The nearest d that float16 represents."""
    return half(least(step * load(tile.power, 0) / book.unit, splat(HALF_MAX)))


@njit(cache=True, nogil=True)
def _rounded(book: Book, tile: Tile, step: Any) -> Any:
    """The nearest step that can be stored; 0 if d underflows."""
    return _half_of(book, tile, step) * book.unit / load(tile.power, 0)


@njit(cache=True, nogil=True)
def _try_neighbours(book: Book, tile: Tile, room: Floats, step: Any) -> None:
    """Move the m of each group by one where its real error gets less."""
    for g in range(GROUPS):
        middle, best, smallest = load(tile.m, g * ROWS), splat(0.0), splat(INFINITY)
        for move in range(-1, 2):
            m = least(most(middle + np.float32(move), splat(0.0)), splat(15.0))
            scale = step * (m * 2.0 + 1.0)
            _flip_group(book, tile, room, g, scale)
            error = _group_error(book, tile, room, g, scale)
            best, smallest = where_less(error, smallest, m, best), least(error, smallest)
        store(tile.m, g * ROWS, best)


@njit(cache=True, nogil=True)
def _encode(
    book: Book, tile: Tile, room: Floats, step: Any, flips: int, found: Found, row: int, stop: int, b: int
) -> None:
    """Nearest codewords for the scales at hand, written to ``found`` in the rows where nothing was better before."""
    total, zero = splat(0.0), splat(0.0)
    store(tile.product, 0, zero)
    store(tile.square, 0, zero)
    for pair in range(BLOCK // 8):
        scale = step * (load(tile.m, pair // 4 * ROWS) * 2.0 + 1.0)
        smallest = splat(INFINITY)
        for rank in range(flips):
            if book.even:
                flip(book.levels, tile.weight, tile.h, (8 * pair, 8 * pair + 8), scale, rank, room, tile.value)
            else:
                store(room, FLIPPED, splat(8.0))
            nearest(book.levels, book.order, book.places, tile.value, tile.h, 8 * pair, scale, room)
            store(tile.error, 0, smallest)
            _take(book, tile, room, pair)
            smallest = least(load(room, ERROR), smallest)
        total = total + smallest
        _add_products(book, tile, pair)
    # A step of 0 codes nothing: no error is less than that of zeros, but for rounding.
    total = where_less(zero, step, total, splat(INFINITY))
    store(tile.error, 0, total)
    store(tile.d, 0, _half_of(book, tile, step))
    for lane in range(min(ROWS, stop - row)):
        if tile.error[lane] < tile.least[lane]:
            tile.least[lane] = tile.error[lane]
            found.d[row + lane, b] = tile.d[lane]
            _write(book, tile, lane, found, row + lane, b)


@njit(cache=True, nogil=True)
def _take(book: Book, tile: Tile, room: Floats, pair: int) -> None:
    """Keep the codewords just found for 8 columns, in the rows where they are better than ``tile.error``."""
    places, code, codes, flipped = book.places, book.code, tile.codes, tile.flipped
    for lane in range(ROWS):
        if room[ERROR + lane] < tile.error[lane]:
            flipped[pair * ROWS + lane] = int(room[FLIPPED + lane])
            for v in range(2):
                codes[(2 * pair + v) * ROWS + lane] = nearest_code(places, code, room, v, lane)


@njit(cache=True, nogil=True)
def _add_products(book: Book, tile: Tile, pair: int) -> None:
    """Add the sums of h x (2 m + 1) q and h ((2 m + 1) q)^2 that refit the step; x is negative at a wrong sign."""
    for lane in range(ROWS):
        multiple = tile.m[pair // 4 * ROWS + lane] * np.float32(2) + np.float32(1)
        product, square = np.float32(0), np.float32(0)
        for v in range(2):
            code = tile.codes[(2 * pair + v) * ROWS + lane]
            for position in range(4):
                i = 4 * v + book.order[position]
                c = 8 * pair + i
                level = book.grid[code, position]
                at = abs(tile.weight[c * ROWS + lane])
                share = tile.h[c] * level
                product += share * (-at if tile.flipped[pair * ROWS + lane] == i else at)
                square += share * level
        tile.product[lane] += multiple * product
        tile.square[lane] += multiple * multiple * square


@njit(cache=True, nogil=True)
def _refitted(tile: Tile) -> Any:
    """The step of least squares for the codewords at hand."""
    return most(load(tile.product, 0) / load(tile.square, 0), splat(0.0))


@njit(cache=True, nogil=True)
def _write(book: Book, tile: Tile, lane: int, found: Found, row: int, b: int) -> None:
    for g in range(GROUPS):
        found.sub[row, b, g] = int(tile.m[g * ROWS + lane])
    for v in range(BLOCK // 4):
        found.codes[row, b, v] = tile.codes[v * ROWS + lane]
    for pair in range(BLOCK // 8):
        byte, flipped = 0, tile.flipped[pair * ROWS + lane]
        for i in range(8):
            if (tile.weight[(8 * pair + i) * ROWS + lane] < 0) != (flipped == i):
                byte |= 1 << i
        found.signs[row, b, pair] = byte
