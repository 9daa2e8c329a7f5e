"""Search for the scales of blocks with a codebook (IQ3, IQ2, IQ1), sixteen rows at a time.

    weight ~ sign * scale * codeword          scale = step * (2 m + 1), one for each group; step = unit * d

For a block of 256: the error of each group on a few trial scales; the d whose multiples suit all groups best (from
those errors, interpolated); the neighbouring multiples by their real error; then codewords and signs, d refitted to
them by least squares, and codewords and signs again. What has the least real error is kept, zeros included.
All of it is arithmetic on lanes (`ggml_lanes`): row r of the tile in lane r.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quantkit.kernels.numba.ggml.codebook_tile import (
    BLOCK,
    TRIALS,
    Found,
    Tile,
    code_eight,
    errors_of_shifts,
    fill,
    flip_group,
    group_error,
    make_tile,
    shift_columns,
)
from quantkit.kernels.numba.ggml.vectors import (
    ERROR,
    EVEN,
    FLIPPED,
    INFINITY,
    ROOM,
    SHIFTED,
    Book,
    Floats,
    aligned,
    flip,
    nearest_code,
)
from quantkit.kernels.numba.lanes import ROWS, absolute, fma, half, least, load, most, rint, splat, store, where_less

DS = 16
BELOW_TOP, D_STEP = np.float32(2.0), np.float32(0.25)
"""Candidates of d give the largest scale a multiple from the highest less BELOW_TOP on, in steps of D_STEP."""
FLIPS = 3
"""Weights of eight that are tried with the wrong sign, where there must be one."""
HALF_MAX = np.float32(65504.0)
LEAST_REACH = np.float32(1e-6)
"""Size of a group of zeros, beside the largest weight of the block: its scale has some size, too."""


@njit(cache=True, nogil=True)
def search_rows(book: Book, weight: Floats, importance: Floats, rows: tuple[int, int], found: Found) -> None:
    """weight (out, in) finite, importance (in,) >= 0: fill rows[0] to rows[1] of ``found``, zeros before."""
    tile, room = make_tile(), aligned(ROOM)
    for row in range(rows[0], rows[1], ROWS):
        for b in range(weight.shape[1] // BLOCK):
            columns = slice(b * BLOCK, (b + 1) * BLOCK)
            if not fill(tile, weight[row : rows[1], columns], importance[columns]):
                continue
            _measure(book, tile, room)
            step = _rounded(book, tile, _best_step(book, tile))
            _try_neighbours(book, tile, room, step)
            _encode(book, tile, room, step, 1, found, row, rows[1], b)
            step = _rounded(book, tile, _refitted(tile))
            _encode(book, tile, room, step, FLIPS, found, row, rows[1], b)


@njit(cache=True, nogil=True)
def _measure(book: Book, tile: Tile, room: Floats) -> None:
    """The curve of each group, its unit, its likely scale and its error of zeros."""
    total = splat(0.0)
    for g in range(BLOCK // book.group):
        reach, zero = splat(LEAST_REACH), splat(0.0)
        for c in range(g * book.group, (g + 1) * book.group):
            x = absolute(load(tile.weight, c * ROWS))
            reach, zero = most(reach, x), zero + tile.h[c] * x * x
        unit, best, likely = reach / (book.levels[book.levels.size - 1] + book.shift), splat(INFINITY), splat(0.0)
        flip_group(book, tile, room, g, unit)
        for trial in range(TRIALS):
            scale = unit * (book.lowest + book.step * np.float32(trial))
            error = group_error(book, tile, room, g, scale)
            store(tile.curve, (g * TRIALS + trial) * ROWS, error)
            likely, best = where_less(error, best, scale, likely), least(error, best)
        store(tile.unit, g * ROWS, unit)
        store(tile.zero, g * ROWS, zero)
        store(tile.likely, g * ROWS, likely)
        total = total + zero
    store(tile.least, 0, total)


@njit(cache=True, nogil=True)
def _expected(tile: Tile, g: int, scale: Any, lowest: Any, between: Any) -> Any:
    """Error of a group on any scale, from its curve: linear between trials and down to zero, quadratic above.
    ``lowest``, ``between``: the first trial scale and the step, as in the book."""
    unit, zero = load(tile.unit, g * ROWS), load(tile.zero, g * ROWS)
    place = (scale / unit - lowest) / between
    inside = splat(0.0)
    for trial in range(TRIALS):
        share = most(1.0 - absolute(place - np.float32(trial)), splat(0.0))
        inside = fma(share, load(tile.curve, (g * TRIALS + trial) * ROWS), inside)
    first, last = load(tile.curve, g * TRIALS * ROWS), load(tile.curve, (g * TRIALS + TRIALS - 1) * ROWS)
    below = zero + (first - zero) * scale / (unit * lowest)
    ratio = scale / (unit * (lowest + between * np.float32(TRIALS - 1)))
    result = where_less(place, splat(0.0), below, inside)
    return where_less(splat(np.float32(TRIALS - 1)), place, last * ratio * ratio, result)


@njit(cache=True, nogil=True)
def _multiple(tile: Tile, g: int, step: Any, top: int, lowest: Any, between: Any) -> tuple[Any, Any]:
    """The better of the two odd multiples of ``step`` beside the likely scale of a group: m and the error expected."""
    m = rint((load(tile.likely, g * ROWS) / step - 2.0) * 0.5)
    m = least(most(m, splat(0.0)), splat(np.float32(top - 1)))
    lower = _expected(tile, g, step * (m * 2.0 + 1.0), lowest, between)
    upper = _expected(tile, g, step * (m * 2.0 + 3.0), lowest, between)
    return where_less(upper, lower, m + 1.0, m), least(upper, lower)


@njit(cache=True, nogil=True)
def _best_step(book: Book, tile: Tile) -> Any:
    """The step = unit * d that is expected to suit the block best, with multiples in ``m``."""
    largest = splat(0.0)
    for g in range(BLOCK // book.group):
        largest = most(largest, load(tile.likely, g * ROWS))
    best, smallest, first = splat(0.0), splat(INFINITY), np.float32(2 * book.top + 1) - BELOW_TOP
    for trial in range(DS):
        step = _rounded(book, tile, largest / (first + D_STEP * np.float32(trial)))
        total = splat(0.0)
        for g in range(BLOCK // book.group):
            total = total + _multiple(tile, g, step, book.top, book.lowest, book.step)[1]
        best, smallest = where_less(total, smallest, step, best), least(total, smallest)
    for g in range(BLOCK // book.group):
        store(tile.m, g * ROWS, _multiple(tile, g, best, book.top, book.lowest, book.step)[0])
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
    for g in range(BLOCK // book.group):
        middle, best, smallest = load(tile.m, g * ROWS), splat(0.0), splat(INFINITY)
        for move in range(-1, 2):
            m = least(most(middle + np.float32(move), splat(0.0)), splat(np.float32(book.top)))
            scale = step * (m * 2.0 + 1.0)
            flip_group(book, tile, room, g, scale)
            error = group_error(book, tile, room, g, scale)
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
    for eight in range(BLOCK // 8):
        g = 8 * eight // book.group
        scale = step * (load(tile.m, g * ROWS) * 2.0 + 1.0)
        smallest = splat(INFINITY)
        for rank in range(_ranks(book, flips)):
            _prepare(book, tile, room, eight, scale, rank)
            code_eight(book, tile, room, 8 * eight, scale)
            store(tile.error, 0, smallest)
            _take(book, tile, room, eight)
            smallest = least(load(room, ERROR), smallest)
        total = total + smallest
        _add_products(book, tile, eight, g)
    # A step of 0 codes nothing: no error is less than that of zeros, but for rounding.
    total = where_less(zero, step, total, splat(INFINITY))
    store(tile.error, 0, total)
    store(tile.d, 0, _half_of(book, tile, step))
    for lane in range(min(ROWS, stop - row)):
        if tile.error[lane] < tile.least[lane]:
            tile.least[lane] = tile.error[lane]
            found.d[row + lane, b] = tile.d[lane]
            _write(book, tile, lane, found, row + lane, b)


@njit(inline="always")
def _ranks(book: Book, flips: int) -> int:
    """How many wrong signs, or shifts, are tried for 8 weights."""
    if book.signs == EVEN:
        return flips
    return 2 if book.signs == SHIFTED else 1


@njit(inline="always")
def _prepare(book: Book, tile: Tile, room: Floats, eight: int, scale: Any, rank: int) -> None:
    """The values of 8 columns under the wrong sign, or the shift, of a rank; which one goes into the room."""
    columns = 8 * eight, 8 * eight + 8
    if book.signs == EVEN:
        flip(book.levels, tile.weight, tile.h, columns, scale, rank, room, tile.value)
    elif book.signs < SHIFTED:
        store(room, FLIPPED, splat(8.0))
    else:
        if book.signs == SHIFTED:
            store(room, FLIPPED, splat(np.float32(rank)))
        elif 8 * eight % book.group == 0:
            up, down = errors_of_shifts(book, tile, room, (8 * eight, 8 * eight + book.group), scale)
            store(room, FLIPPED, where_less(down, up, splat(1.0), splat(0.0)))
        shift_columns(tile, columns, (1.0 - 2.0 * load(room, FLIPPED)) * (scale * book.shift))


@njit(cache=True, nogil=True)
def _take(book: Book, tile: Tile, room: Floats, eight: int) -> None:
    """Keep the codewords just found for 8 columns, in the rows where they are better than ``tile.error``."""
    places, code, codes, flipped = book.places, book.code, tile.codes, tile.flipped
    vectors = 8 // book.order.size
    for lane in range(ROWS):
        if room[ERROR + lane] < tile.error[lane]:
            flipped[eight * ROWS + lane] = int(room[FLIPPED + lane])
            for v in range(vectors):
                codes[(vectors * eight + v) * ROWS + lane] = nearest_code(places, code, room, v, lane)


@njit(cache=True, nogil=True)
def _add_products(book: Book, tile: Tile, eight: int, g: int) -> None:
    """Add the sums of h x (2 m + 1) q and h ((2 m + 1) q)^2 that refit the step; x is negative at a wrong sign."""
    width = book.order.size
    vectors, shifted = 8 // width, book.signs >= SHIFTED
    for lane in range(ROWS):
        multiple = tile.m[g * ROWS + lane] * np.float32(2) + np.float32(1)
        product, square = np.float32(0), np.float32(0)
        flipped = tile.flipped[eight * ROWS + lane]
        for v in range(vectors):
            code = tile.codes[(vectors * eight + v) * ROWS + lane]
            for position in range(width):
                i = width * v + book.order[position]
                c = 8 * eight + i
                level, x = book.grid[code, position], tile.weight[c * ROWS + lane]
                if shifted:
                    level += book.shift * np.float32(1 - 2 * flipped)
                else:
                    x = -abs(x) if flipped == i else abs(x)
                share = tile.h[c] * level
                product += share * x
                square += share * level
        tile.product[lane] += multiple * product
        tile.square[lane] += multiple * multiple * square


@njit(cache=True, nogil=True)
def _refitted(tile: Tile) -> Any:
    """The step of least squares for the codewords at hand."""
    return most(load(tile.product, 0) / load(tile.square, 0), splat(0.0))


@njit(cache=True, nogil=True)
def _write(book: Book, tile: Tile, lane: int, found: Found, row: int, b: int) -> None:
    vectors = 8 // book.order.size
    for g in range(BLOCK // book.group):
        found.sub[row, b, g] = int(tile.m[g * ROWS + lane])
    for eight in range(BLOCK // 8):
        flipped, below = tile.flipped[eight * ROWS + lane], 0
        if book.signs >= SHIFTED:
            below = flipped * book.grid.shape[0]
        else:
            found.signs[row, b, eight] = _signs(tile, lane, eight, flipped)
        for v in range(vectors * eight, vectors * (eight + 1)):
            found.codes[row, b, v] = tile.codes[v * ROWS + lane] + below


@njit(cache=True, nogil=True)
def _signs(tile: Tile, lane: int, eight: int, flipped: int) -> int:
    byte = 0
    for i in range(8):
        if (tile.weight[(8 * eight + i) * ROWS + lane] < 0) != (flipped == i):
            byte |= 1 << i
    return byte
