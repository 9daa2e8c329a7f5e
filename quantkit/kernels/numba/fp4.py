"""The search of `quantkit.schemes.nvfp4` for sixteen rows at a time: same candidates, and the first of equals wins."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.kernels.numba.lanes import (
    ROWS,
    absolute,
    fma,
    kernel,
    least,
    load,
    rint,
    splat,
    store,
    where_less,
)
from quantkit.kernels.numba.threads import spread_over
from quantkit.kernels.numba.tile import Floats, fill

Codes = NDArray[np.uint8]


def search(weight: Tensor, importance: Tensor, start: Tensor, values: Tensor, steps: tuple[int, int]) -> Tensor:
    """weight (B, out, in), importance (B, in), float32; start (B, out, groups) uint8 codes of scales; values (B, codes)
    float32: the scale of each code -> the best code from start + steps[0] to before start + steps[1], within 1 and the
    last code."""
    n_matrices, out_features, _ = weight.shape
    rows_of, h = weight.detach().contiguous().numpy(), importance.detach().contiguous().numpy()
    first_codes, scales = start.contiguous().numpy(), values.contiguous().numpy()
    best = np.empty(first_codes.shape, np.uint8)
    tiles = -(-out_features // ROWS)

    def run(first: int, last: int) -> None:
        while first < last:
            b, tile = divmod(first, tiles)
            stop = min(tiles, tile + last - first)
            rows = tile * ROWS, min(stop * ROWS, out_features)
            search_rows(rows_of[b], h[b], rows, first_codes[b], scales[b], steps, best[b])
            first += stop - tile

    with spread_over(torch.get_num_threads()) as spread:
        spread(run, n_matrices * tiles)
    return torch.from_numpy(best)


@kernel
def search_rows(
    weight: Floats,
    h: Floats,
    rows: tuple[int, int],
    start: Codes,
    values: Floats,
    steps: tuple[int, int],
    best: Codes,
) -> None:
    """weight (out, in), h (in,), start (out, groups): fill rows[0] to rows[1] of best (out, groups)."""
    group = weight.shape[1] // start.shape[1]
    tile, scales, found = np.empty(group * ROWS, np.float32), np.ones(ROWS, np.float32), np.empty(ROWS, np.float32)
    for row in range(rows[0], rows[1], ROWS):
        width = min(ROWS, rows[1] - row)
        for g in range(start.shape[1]):
            fill(tile, weight[: rows[1]], row, g * group, group)
            lowest, winner = splat(np.inf), splat(0.0)
            for step in range(steps[0], steps[1]):
                for lane in range(width):
                    code = min(max(np.int64(start[row + lane, g]) + step, 1), values.size - 1)
                    scales[lane] = values[code]
                scale, error = load(scales, 0), splat(0.0)
                for column in range(group):
                    size = absolute(load(tile, column * ROWS))
                    units = least(size / scale, splat(6.0))
                    width_of_step = where_less(
                        units, splat(1.75), splat(0.5), where_less(units, splat(3.5), splat(1.0), splat(2.0))
                    )
                    off = rint(units / width_of_step) * width_of_step * scale - size
                    error = fma(off * off, splat(h[g * group + column]), error)
                winner = where_less(error, lowest, splat(np.float32(step)), winner)
                lowest = least(error, lowest)
            store(found, 0, winner)
            for lane in range(width):
                code = np.int64(start[row + lane, g]) + np.int64(found[lane])
                best[row + lane, g] = np.uint8(min(max(code, 1), values.size - 1))
