"""MXFP4: the power of two of each block, the search of `quantkit.schemes.ggml.symmetric` for sixteen rows at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.ggml_constants import POWERS
from quantkit.kernels.numba.lanes import ROWS, kernel, least, load, part, splat, store, where_less
from quantkit.kernels.numba.tile import Floats, fill, measure, moments, range_of

Exponents = NDArray[np.int64]
SMALLEST, LARGEST = -128, 126
"""Exponents of the powers of two that a block can store."""


@kernel
def search_power(
    weight: Floats,
    h: Floats,
    rows: tuple[int, int],
    block: int,
    levels: tuple[float, float],
    table: Floats,
    matters: float,
    d_out: Floats,
) -> None:
    """weight (out, in), h (in,): fill rows[0] to rows[1] of d_out (out, blocks)."""
    tile = np.empty(block * ROWS, np.float32)
    unit, power = np.zeros(ROWS, np.int64), np.zeros(ROWS, np.int64)
    scale, best_step = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    for row in range(rows[0], rows[1], ROWS):
        for column in range(0, weight.shape[1], block):
            fill(tile, weight[: rows[1]], row, column, block)
            block_h = h[column : column + block]
            # Products of huge weights would overflow, those of tiny ones vanish: the largest becomes 0.5 to 1.
            _exponents(range_of(tile, block_h, 0, block, splat(0.0), splat(-1.0))[2], scale, unit)
            for place in range(block * ROWS):
                tile[place] = math.ldexp(tile[place], -unit[place % ROWS])
            negligible = moments(tile, block_h, 0, block)[2] * matters
            _exponents(range_of(tile, block_h, 0, block, splat(0.0), negligible)[2], scale, power)
            best_error, best = splat(np.float32(np.inf)), splat(0.0)
            for step in POWERS:
                for lane in range(ROWS):
                    scale[lane] = math.ldexp(1.0, _stored(unit[lane] + power[lane] + step) - unit[lane])
                lanes = load(scale, 0)
                error, _, _ = measure(tile, block_h, 0, block, lanes, 1.0 / lanes, levels[0], levels[1], table)
                best = where_less(error, best_error, splat(np.float32(step)), best)
                best_error = least(error, best_error)
            store(best_step, 0, best)
            for lane in range(min(ROWS, rows[1] - row)):
                exponent = _stored(unit[lane] + power[lane] + int(best_step[lane]))
                d_out[row + lane, column // block] = math.ldexp(1.0, exponent)


@part
def _exponents(values: Any, numbers: Floats, exponents: Exponents) -> None:
    """The powers of two just above the values, 0 for 0. ``numbers``: (16,), overwritten."""
    store(numbers, 0, values)
    for lane in range(ROWS):
        exponents[lane] = math.frexp(numbers[lane])[1]


@part
def _stored(exponent: int) -> int:
    """The nearest exponent that a block can store."""
    return min(max(exponent, SMALLEST), LARGEST)
