"""What the sweep and the polish share: rows of a matrix as lanes, up to sixteen of them, and the nearest level.

Weights lie (in, out) here, so that sixteen rows of a column are neighbours. The last tile of a matrix may have fewer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.kernels.backend import FixedScales
from quantkit.kernels.numba.lanes import (
    ROWS,
    absolute,
    inlined,
    least,
    load,
    most,
    rint,
    splat,
    store,
    store_bytes,
    where_less,
)
from quantkit.kernels.numba.tile import Floats

Levels = tuple[np.float32, np.float32, Floats, Floats]
"""zero (unless it differs by group), the highest code, and, for levels that are no integers in a row, the middles
between them and the levels; else these have no entries."""


def levels_of(grid: FixedScales) -> Levels:
    """How the kernels round on this grid."""
    zero = np.float32(0.0 if isinstance(grid.zero, Tensor) else grid.zero)
    table = np.empty(0, np.float32) if grid.table is None else grid.table.numpy()
    return zero, np.float32(grid.top), (table[1:] + table[:-1]) / np.float32(2), table


def flat(tensor: Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).numpy()


def transposed(tensor: Tensor) -> Tensor:
    """(B, m, n) -> (B, n, m), always a copy, and with the usual strides even where m or n is 1."""
    return tensor.mT.clone(memory_format=torch.contiguous_format)


@inlined
def take(values: Floats, place: int, width: int, spare: Floats) -> Any:
    """Lanes from values[place : place + width]; those past the end are whatever ``spare`` has."""
    if width == ROWS:
        lanes = load(values, place)
    else:
        for lane in range(width):
            spare[lane] = values[place + lane]
        lanes = load(spare, 0)
    return lanes


@inlined
def store_part(values: Floats, place: int, width: int, spare: Floats, lanes: Any) -> None:
    """Write the first ``width`` lanes."""
    if width == ROWS:
        store(values, place, lanes)
    else:
        store(spare, 0, lanes)
        for lane in range(width):
            values[place + lane] = spare[lane]


@inlined
def store_codes(codes: NDArray[np.uint8], place: int, width: int, spare: Floats, lanes: Any) -> None:
    """Write the first ``width`` lanes, whole numbers of 0 to 255."""
    if width == ROWS:
        store_bytes(codes, place, lanes)
    else:
        store(spare, 0, lanes)
        for lane in range(width):
            codes[place + lane] = np.uint8(spare[lane])


@inlined
def quotient(value: Any, scale: Any) -> Any:
    """The value in units of a scale; a group without extent has scale 0, and any code will do."""
    return where_less(splat(0.0), absolute(scale), value / scale, splat(0.0))


@inlined
def nearest(value: Any, zero: Any, top: float, middles: Floats, table: Floats) -> tuple[Any, Any]:
    """Code and level nearest to a value in units of its scale."""
    if middles.size == 0:
        code = least(most(rint(value + zero), splat(0.0)), splat(top))
        level = code - zero
    else:
        code, level = splat(0.0), splat(table[0])
        for step in range(middles.size):
            middle = splat(middles[step])
            code = where_less(middle, value, code + 1.0, code)
            level = where_less(middle, value, splat(table[step + 1]), level)
    return code, level
