"""Search for the scales and codewords of IQ3_XXS and IQ3_S blocks, compiled by numba for the processor.

Enters: rows of weights with their importance, and a codebook of vectors of 4 magnitudes. Leaves: per block of 256 the
float16 d and 8 scale numbers m, per vector a codeword, per weight a sign:

    weight ~ sign * scale * codeword          scale = unit * d * (2 m + 1), one for each group of 32

The nearest codeword is found exactly. A block is 64 vectors, which are searched side by side: costs of each level are
tabulated for each of the 4 positions, those of the third and fourth are added for all pairs of levels, and a codeword
costs one more sum. Codewords that share the first pair of levels are taken four at a time.

The order of work in a block: error of each group on a few scales; the d whose multiples suit all groups best (from
those errors, interpolated); the neighbouring multiples with their real error; then twice: codewords and signs, and d
refitted to them by least squares. What has the least real error is kept, a block of zeros included.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

VECTORS = 64
GROUPS = 8
TRIALS = 10
"""Scales on which each group is measured..."""
LOWEST = np.float32(0.68)
STEP = np.float32(0.08)
"""...from LOWEST times the scale that maps the largest magnitude to the highest level, in steps of STEP of it."""
SUPER_TRIALS = 16
SUPER_FIRST, SUPER_STEP = np.float32(29), np.float32(0.25)
"""Candidates of d give the group of the largest scale a multiple (2 m + 1) of 29, 29.25... (31 is the highest)."""
FLIPS = 3
"""Weights of a pair of vectors that are tried with the wrong sign, if the number of its negative ones is odd."""
INFINITY = np.float32(np.inf)
HALF_MAX = np.float32(65504)


class Book(NamedTuple):
    """A codebook as the search wants it. Positions of a vector are permuted by ``order``: the first two are the pair
    that codewords are grouped by.

    levels (8,) float32, rising; grid (codewords, 4) float32 in permuted order; rows ``first`` (chunks,), ``second``
    (chunks, 4) of the tables of pairs, ``code`` (chunks, 4) the codewords; order (4,); unit: scale of d; even: whether
    each 8 weights have an even number of minus signs (IQ3_XXS).
    """

    levels: Floats
    grid: Floats
    first: Integers
    second: Integers
    code: Integers
    order: Integers
    unit: np.float32
    even: bool


class Found(NamedTuple):
    """What is stored: d (rows, blocks) int16, the bits of a float16; sub (rows, blocks, 8) uint8; codes (rows, blocks,
    64) int16; signs (rows, blocks, 32) uint8, bit i for weight i of 8."""

    d: NDArray[np.int16]
    sub: NDArray[np.uint8]
    codes: NDArray[np.int16]
    signs: NDArray[np.uint8]


class Block(NamedTuple):
    """The block at hand and room to work, all float32 unless said. First dimension 4: permuted position; 64: vector.

    magnitude, weight (4, 64): of the block, divided by powers of two (importance: by its maximum); negative (4, 64)
    bool; odd (32,) bool: pairs of vectors that need a wrong sign. value (4, 64): magnitudes, wrong signs as minus.
    scale (64,); codes, best_codes (64,) int64; flipped, best_flipped (32,) int64: index 4 * half + position of the
    wrong sign, or no index of the 8; error (64,), best_error (64,) of each vector.
    """

    magnitude: Floats
    weight: Floats
    negative: NDArray[np.bool_]
    odd: NDArray[np.bool_]
    value: Floats
    scale: Floats
    increase: Floats
    cost: Floats
    first: Floats
    second: Floats
    error: Floats
    chunk: NDArray[np.int32]
    codes: Integers
    flipped: Integers
    best_error: Floats
    best_codes: Integers
    best_flipped: Integers


class Groups(NamedTuple):
    """Of the 8 groups of a block. curve (8, TRIALS): error on each trial scale; unit (8,): the scale that trials are
    multiples of; zero (8,): error of zeros; likely (8,): scale of the best trial; error, other (8,); m, wanted (8,)
    int64."""

    curve: Floats
    unit: Floats
    zero: Floats
    likely: Floats
    error: Floats
    other: Floats
    m: Integers
    wanted: Integers


@njit(error_model="numpy", cache=True)
def half_bits(value):
    """Bits of the float16 nearest to a float32 >= 0, ties to even; 65504 for what is greater."""
    if value >= HALF_MAX:
        return 0x7BFF
    if value < np.float32(2.0**-14):
        return int(np.rint(value * np.float32(2.0**24)))
    bits = int(np.float32(value).view(np.uint32))
    return ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) - (112 << 10)


@njit(error_model="numpy", cache=True)
def half_value(bits):
    """The float16 >= 0 of these bits, as float32."""
    exponent, fraction = bits >> 10, bits & 0x3FF
    if exponent == 0:
        return np.float32(fraction * 2.0**-24)
    return np.float32((1024 + fraction) * 2.0 ** (exponent - 25))


@njit(error_model="numpy", cache=True)
def _tabulate(book, block):
    """Costs of levels and of pairs of levels, for the block's values and scales."""
    value, weight, scale, cost = block.value, block.weight, block.scale, block.cost
    for position in range(4):
        for level in range(8):
            for v in range(VECTORS):
                miss = value[position, v] - scale[v] * book.levels[level]
                cost[position * 8 + level, v] = weight[position, v] * miss * miss
    for i in range(8):
        for j in range(8):
            for v in range(VECTORS):
                block.first[i * 8 + j, v] = cost[i, v] + cost[8 + j, v]
    for i in range(8):
        for j in range(8):
            for v in range(VECTORS):
                block.second[i * 8 + j, v] = cost[16 + i, v] + cost[24 + j, v]


@njit(error_model="numpy", cache=True)
def _least_error(book, block):
    """The error of the nearest codeword of each vector."""
    _tabulate(book, block)
    first, second, error = block.first, block.second, block.error
    for v in range(VECTORS):
        error[v] = INFINITY
    for chunk in range(book.first.shape[0]):
        # Unsigned: no test for indices from the end.
        row = np.uintp(book.first[chunk])
        b0, b1 = np.uintp(book.second[chunk, 0]), np.uintp(book.second[chunk, 1])
        b2, b3 = np.uintp(book.second[chunk, 2]), np.uintp(book.second[chunk, 3])
        for v in range(VECTORS):
            t0, t1, t2, t3 = second[b0, v], second[b1, v], second[b2, v], second[b3, v]
            t0 = t1 if t1 < t0 else t0
            t2 = t3 if t3 < t2 else t2
            t0 = t2 if t2 < t0 else t0
            t0 += first[row, v]
            least = error[v]
            error[v] = t0 if t0 < least else least


@njit(error_model="numpy", cache=True)
def _nearest(book, block):
    """The nearest codeword of each vector and its error. Of equals, the first in the order of the chunks."""
    _tabulate(book, block)
    first, second, error, found = block.first, block.second, block.error, block.chunk
    for v in range(VECTORS):
        error[v] = INFINITY
    for chunk in range(book.first.shape[0]):
        row, number = np.uintp(book.first[chunk]), np.int32(chunk)
        b0, b1 = np.uintp(book.second[chunk, 0]), np.uintp(book.second[chunk, 1])
        b2, b3 = np.uintp(book.second[chunk, 2]), np.uintp(book.second[chunk, 3])
        for v in range(VECTORS):
            t0, t1, t2, t3 = second[b0, v], second[b1, v], second[b2, v], second[b3, v]
            t0 = t1 if t1 < t0 else t0
            t2 = t3 if t3 < t2 else t2
            t0 = t2 if t2 < t0 else t0
            t0 += first[row, v]
            least = error[v]
            found[v] = number if t0 < least else found[v]
            error[v] = t0 if t0 < least else least
    for v in range(VECTORS):
        chunk, which = found[v], 0
        for other in range(1, 4):
            if second[book.second[chunk, other], v] < second[book.second[chunk, which], v]:
                which = other
        block.codes[v] = book.code[chunk, which]


@njit(error_model="numpy", cache=True)
def _flip(book, block, rank):
    """Values from magnitudes: in each odd pair of vectors, the weight whose wrong sign costs least (``rank`` 0), or
    second least... (1, 2) gets it. The cost is that of a free choice of levels."""
    low, high = book.levels[0], book.levels[7]
    magnitude, increase = block.magnitude, block.increase
    for position in range(4):
        for v in range(VECTORS):
            at, scale = magnitude[position, v], block.scale[v]
            wrong = at + low * scale
            below, above = max(low * scale - at, np.float32(0)), max(at - high * scale, np.float32(0))
            increase[position, v] = block.weight[position, v] * (wrong * wrong - below * below - above * above)
            block.value[position, v] = at
    for pair in range(VECTORS // 2):
        block.flipped[pair] = 8
        if not block.odd[pair]:
            continue
        for again in range(rank + 1):
            choice = 0
            for i in range(8):
                if increase[i & 3, 2 * pair + (i >> 2)] < increase[choice & 3, 2 * pair + (choice >> 2)]:
                    choice = i
            block.flipped[pair] = choice
            increase[choice & 3, 2 * pair + (choice >> 2)] = INFINITY
        position, v = choice & 3, 2 * pair + (choice >> 2)
        block.value[position, v] = -magnitude[position, v]


@njit(error_model="numpy", cache=True)
def _sum_groups(error, sums):
    """Errors of 64 vectors -> of 8 groups; returns the total."""
    total = 0.0
    for g in range(GROUPS):
        part = np.float32(0)
        for v in range(8 * g, 8 * g + 8):
            part += error[v]
        sums[g] = part
        total += part
    return total


@njit(error_model="numpy", cache=True)
def _set_scale(block, step, m):
    for v in range(VECTORS):
        block.scale[v] = step * np.float32(2 * m[v // 8] + 1)


@njit(error_model="numpy", cache=True)
def _load(book, weight, importance, block, groups):
    """Fill the block from 256 weights and their importance; returns (power of two that weights were divided by, error
    of zeros); (0, 0) if all weights are zero."""
    largest, most = np.float32(0), np.float32(0)
    for i in range(256):
        largest, most = max(largest, abs(weight[i])), max(most, importance[i])
    if largest == 0:
        return 0.0, 0.0
    power = 2.0 ** np.floor(np.log2(np.float64(largest)))
    inverse, share = 1 / power, 1 / np.float64(most) if most > 0 else 0.0
    for v in range(VECTORS):
        for position in range(4):
            i = 4 * v + book.order[position]
            block.magnitude[position, v] = abs(weight[i] * inverse)
            block.negative[position, v] = weight[i] < 0
            # Weights without importance are stored sensibly where that costs the others nothing.
            block.weight[position, v] = max(importance[i] * share, 1e-8)
    for pair in range(VECTORS // 2):
        count = 0
        for i in range(8):
            count += block.negative[i & 3, 2 * pair + (i >> 2)]
        block.odd[pair] = book.even and count % 2 == 1
    total = 0.0
    for g in range(GROUPS):
        top, zero = np.float32(1e-6), np.float32(0)
        for v in range(8 * g, 8 * g + 8):
            for position in range(4):
                at = block.magnitude[position, v]
                top, zero = max(top, at), zero + block.weight[position, v] * at * at
        groups.unit[g], groups.zero[g] = top / book.levels[7], zero
        total += zero
    return power, total


@njit(error_model="numpy", cache=True)
def _measure(book, block, groups):
    """Errors of all groups on the trial scales; returns the largest of the groups' best scales."""
    for v in range(VECTORS):
        block.scale[v] = groups.unit[v // 8]
    _flip(book, block, 0)
    for trial in range(TRIALS):
        for v in range(VECTORS):
            block.scale[v] = groups.unit[v // 8] * (LOWEST + STEP * np.float32(trial))
        _least_error(book, block)
        _sum_groups(block.error, groups.error)
        groups.curve[:, trial] = groups.error
    largest = np.float32(0)
    for g in range(GROUPS):
        best = 0
        for trial in range(1, TRIALS):
            if groups.curve[g, trial] < groups.curve[g, best]:
                best = trial
        groups.likely[g] = groups.unit[g] * (LOWEST + STEP * np.float32(best))
        largest = max(largest, groups.likely[g])
    return largest


@njit(error_model="numpy", cache=True)
def _expected(groups, g, scale):
    """Error of a group on any scale, from its curve: linear between trials and down to zero, quadratic above."""
    place = (scale / groups.unit[g] - LOWEST) / STEP
    if place <= 0:
        return groups.zero[g] + (groups.curve[g, 0] - groups.zero[g]) * scale / (groups.unit[g] * LOWEST)
    if place >= TRIALS - 1:
        ratio = scale / (groups.unit[g] * (LOWEST + STEP * np.float32(TRIALS - 1)))
        return groups.curve[g, TRIALS - 1] * ratio * ratio
    i = int(place)
    return groups.curve[g, i] + (groups.curve[g, i + 1] - groups.curve[g, i]) * (place - np.float32(i))


@njit(error_model="numpy", cache=True)
def _multiples(groups, step):
    """For each group the better of the two odd multiples of ``step`` beside its likely scale, into ``wanted``;
    returns the error expected of the block."""
    total = np.float32(0)
    for g in range(GROUPS):
        m = min(max(int((groups.likely[g] / step - 1) * np.float32(0.5)), 0), 14)
        lower = _expected(groups, g, step * np.float32(2 * m + 1))
        upper = _expected(groups, g, step * np.float32(2 * m + 3))
        groups.wanted[g] = m + 1 if upper < lower else m
        total += min(upper, lower)
    return total


@njit(error_model="numpy", cache=True)
def _stored_step(book, step, power):
    """(bits of d, the step that they give) nearest to a wanted step = unit * d, in the block's own measure."""
    bits = half_bits(np.float32(step * power / book.unit))
    return bits, np.float32(half_value(bits) * book.unit / power)


@njit(error_model="numpy", cache=True)
def _super_scale(book, groups, largest, power):
    """The step = unit * d that is expected to suit the block best, with its multiples in ``m``; 0 if all underflow."""
    best, least = np.float32(0), INFINITY
    for trial in range(SUPER_TRIALS):
        step = _stored_step(book, largest / (SUPER_FIRST + SUPER_STEP * np.float32(trial)), power)[1]
        if step == 0:
            continue
        error = _multiples(groups, step)
        if error < least:
            best, least = step, error
            groups.m[:] = groups.wanted
    return best


@njit(error_model="numpy", cache=True)
def _try_neighbours(book, block, groups, step):
    """Move each group's m by one if its real error gets less."""
    _set_scale(block, step, groups.m)
    _flip(book, block, 0)
    _least_error(book, block)
    _sum_groups(block.error, groups.error)
    groups.wanted[:] = groups.m
    for move in (-1, 1):
        for v in range(VECTORS):
            block.scale[v] = step * np.float32(2 * min(max(groups.wanted[v // 8] + move, 0), 15) + 1)
        _flip(book, block, 0)
        _least_error(book, block)
        _sum_groups(block.error, groups.other)
        for g in range(GROUPS):
            if groups.other[g] < groups.error[g]:
                groups.error[g] = groups.other[g]
                groups.m[g] = min(max(groups.wanted[g] + move, 0), 15)


@njit(error_model="numpy", cache=True)
def _encode(book, block, flips):
    """Best codewords for the block's scales, with the best of ``flips`` wrong signs in odd pairs, into best_*; returns
    the error of the block."""
    for rank in range(flips if book.even else 1):
        _flip(book, block, rank)
        _nearest(book, block)
        for pair in range(VECTORS // 2):
            v = 2 * pair
            if rank == 0 or block.error[v] + block.error[v + 1] < block.best_error[v] + block.best_error[v + 1]:
                block.best_error[v : v + 2] = block.error[v : v + 2]
                block.best_codes[v : v + 2] = block.codes[v : v + 2]
                block.best_flipped[pair] = block.flipped[pair]
    total = 0.0
    for v in range(VECTORS):
        total += block.best_error[v]
    return total


@njit(error_model="numpy", cache=True)
def _refitted(book, block, groups, step):
    """The step of least squares for the best codewords and the multiples as they are."""
    product, square = 0.0, 0.0
    for v in range(VECTORS):
        multiple, code = np.float32(2 * groups.m[v // 8] + 1), block.best_codes[v]
        for position in range(4):
            level = multiple * book.grid[code, position]
            wrong = block.best_flipped[v >> 1] == 4 * (v & 1) + position
            share = block.weight[position, v] * level
            at = block.magnitude[position, v]
            product += share * (-at if wrong else at)
            square += share * level
    return np.float32(max(product / square, 0.0))


@njit(error_model="numpy", cache=True)
def _keep(book, block, groups, bits, found, row, b):
    """Write the best codewords as block ``b`` of a row."""
    found.d[row, b] = bits
    for g in range(GROUPS):
        found.sub[row, b, g] = groups.m[g]
    for v in range(VECTORS):
        found.codes[row, b, v] = block.best_codes[v]
    for pair in range(VECTORS // 2):
        byte = 0
        for i in range(8):
            position, v = i & 3, 2 * pair + (i >> 2)
            if block.negative[position, v] != (block.best_flipped[pair] == i):
                byte |= 1 << (book.order[position] + 4 * (i >> 2))
        found.signs[row, b, pair] = byte


@njit(error_model="numpy", cache=True)
def _search(book, block, groups, weight, importance, found, row, b):
    """One block. ``found`` holds zeros before, and still does if nothing is better."""
    power, least = _load(book, weight, importance, block, groups)
    if power == 0:
        return
    step = _super_scale(book, groups, _measure(book, block, groups), power)
    if step == 0:
        return
    _try_neighbours(book, block, groups, step)
    for last in (False, True):
        bits, step = _stored_step(book, step, power)
        if step == 0:
            return
        _set_scale(block, step, groups.m)
        error = _encode(book, block, FLIPS if last else 1)
        if error < least:
            least = error
            _keep(book, block, groups, bits, found, row, b)
        step = _refitted(book, block, groups, step)


@njit(error_model="numpy", cache=True)
def _empty_block():
    lanes, pairs = (4, VECTORS), VECTORS // 2
    return Block(
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.bool_),
        np.empty(pairs, np.bool_),
        np.empty(lanes, np.float32),
        np.empty(VECTORS, np.float32),
        np.empty(lanes, np.float32),
        np.empty((32, VECTORS), np.float32),
        np.empty((64, VECTORS), np.float32),
        np.empty((64, VECTORS), np.float32),
        np.empty(VECTORS, np.float32),
        np.zeros(VECTORS, np.int32),
        np.empty(VECTORS, np.int64),
        np.empty(pairs, np.int64),
        np.empty(VECTORS, np.float32),
        np.empty(VECTORS, np.int64),
        np.empty(pairs, np.int64),
    )


@njit(error_model="numpy", cache=True)
def _empty_groups():
    return Groups(
        np.empty((GROUPS, TRIALS), np.float32),
        np.empty(GROUPS, np.float32),
        np.empty(GROUPS, np.float32),
        np.empty(GROUPS, np.float32),
        np.empty(GROUPS, np.float32),
        np.empty(GROUPS, np.float32),
        np.zeros(GROUPS, np.int64),
        np.zeros(GROUPS, np.int64),
    )


@njit(error_model="numpy", cache=True)
def _row(book, weight, importance, found, row):
    block, groups = _empty_block(), _empty_groups()
    for b in range(weight.shape[0] // 256):
        start = 256 * b
        _search(book, block, groups, weight[start : start + 256], importance[start : start + 256], found, row, b)


@njit(error_model="numpy", cache=True, parallel=True)
def search_rows(book, weight, importance, found):
    """Fill ``found`` (zeros before). weight (rows, in) float32, finite; importance (matrices, in) float32 >= 0, each
    for rows / matrices consecutive rows. Rows are shared out to threads; the result doesn't depend on their number."""
    each = weight.shape[0] // importance.shape[0]
    for row in prange(weight.shape[0]):
        _row(book, weight[row], importance[row // each], found, row)
