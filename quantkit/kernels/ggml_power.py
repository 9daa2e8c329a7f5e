"""MXFP4: the power of two of each block, the search of `quantkit.schemes.ggml_search` for sixteen rows at a time."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from quantkit.kernels.ggml_lanes import ROWS, absolute, least, load, splat, store, where_less
from quantkit.kernels.ggml_tile import Floats, fill, measure, range_of

SMALLEST, LARGEST = -128, 126
"""Exponents of the powers of two that a block can store."""


@njit(cache=True, nogil=True)
def search_power(
    weight: Floats,
    h: Floats,
    rows: tuple[int, int],
    block: int,
    levels: tuple[float, float],
    table: Floats,
    d_out: Floats,
) -> None:
    """weight (out, in), h (in,): fill rows[0] to rows[1] of d_out (out, blocks)."""
    tile = np.empty(block * ROWS, np.float32)
    reach, power, scale = np.empty(ROWS, np.float32), np.empty(ROWS, np.int64), np.empty(ROWS, np.float32)
    best_step = np.empty(ROWS, np.float32)
    for row in range(rows[0], rows[1], ROWS):
        for column in range(0, weight.shape[1], block):
            fill(tile, weight[: rows[1]], row, column, block)
            block_h = h[column : column + block]
            store(reach, 0, absolute(range_of(tile, block_h, 0, block)[2]))
            for lane in range(ROWS):
                power[lane] = math.frexp(reach[lane])[1]
                # Products of huge weights would overflow, those of tiny ones vanish.
                for c in range(block):
                    tile[c * ROWS + lane] = math.ldexp(tile[c * ROWS + lane], -power[lane])
            best_error, best = splat(np.float32(np.inf)), splat(0.0)
            for step in (-3, -2, -4, -5):
                for lane in range(ROWS):
                    scale[lane] = math.ldexp(1.0, min(max(power[lane] + step, SMALLEST), LARGEST) - power[lane])
                error, _, _ = measure(tile, block_h, 0, block, load(scale, 0), levels[0], levels[1], table)
                best = where_less(error, best_error, splat(np.float32(step)), best)
                best_error = least(error, best_error)
            store(best_step, 0, best)
            for lane in range(min(ROWS, rows[1] - row)):
                exponent = min(max(power[lane] + int(best_step[lane]), SMALLEST), LARGEST)
                d_out[row + lane, column // block] = math.ldexp(1.0, exponent)
