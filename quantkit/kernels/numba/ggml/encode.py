"""The nearest level of each weight, sixteen columns at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.numba.lanes import ROWS, kernel, least, load, most, rint, splat, store_bytes, where_less
from quantkit.kernels.numba.tile import STEPS, Floats, inverse

Codes = NDArray[np.uint8]


@kernel
def encode_rows(
    weight: Floats,
    scale: Floats,
    offset: Floats,
    rows: tuple[int, int],
    levels: tuple[float, float],
    table: Floats,
    mirrored: bool,
    codes: Codes,
) -> None:
    """weight (out, in), scale (out, groups), offset the same or (0, 0): fill rows[0] to rows[1] of codes (out, in).
    Codes count levels from the lowest; ``mirrored``: from the middle one up, then from it down (sign and magnitude)."""
    group = weight.shape[1] // scale.shape[1]
    low, high = splat(levels[0]), splat(levels[1])
    for row in range(rows[0], rows[1]):
        values, row_codes = weight[row], codes[row]
        for g in range(scale.shape[1]):
            to_levels = inverse(splat(scale[row, g]))
            start = splat(offset[row, g] if offset.size else np.float32(0.0))
            for column in range(g * group, (g + 1) * group, ROWS):
                x = (load(values, column) - start) * to_levels
                if table.size == 0:
                    code = least(most(rint(x), low), high) - low
                else:
                    code = splat(0.0)
                    for step in range(STEPS):
                        code = where_less(splat(table[step]), x, code + 1.0, code)
                    if mirrored:
                        code = where_less(code, splat(7.0), 15.0 - code, code - 7.0)
                store_bytes(row_codes, column, code)
