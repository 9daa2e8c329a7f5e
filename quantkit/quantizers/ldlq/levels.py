"""Rounding to the levels of a grid, as the sweep and the polish in plain torch do it."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.schemes.grid import Grid

_UNROLLED = 32
"""Levels of a table that the GPU kernels compare with one by one, in code as long as the table."""


def fits_gpu_kernels(grid: Grid) -> bool:
    """Whether the kernels for GPUs are to take a grid: MXFP8's 253 levels are left to torch, which bisects."""
    return grid.table is None or grid.top < _UNROLLED


class Levels:
    """The nearest code of a value in units of its scale, and the level of a code."""

    def __init__(self, grid: Grid) -> None:
        self.top = grid.top
        table = grid.table
        self._table = table
        self._middles = None if table is None else (table[1:] + table[:-1]) / 2

    def round(self, values: Tensor, zero: Tensor | float) -> tuple[Tensor, Tensor]:
        """values (overwritten), zero: of integer levels -> codes, levels, both float32 and shaped like values."""
        if self._table is None or self._middles is None:
            codes = values.add_(zero).round_().clamp_(0, self.top)
            return codes, codes - zero
        codes = torch.bucketize(values, self._middles)
        return codes, self._table[codes]

    def of(self, codes: Tensor, zero: Tensor | float) -> Tensor:
        """codes uint8 -> levels float32."""
        return codes.float() - zero if self._table is None else self._table[codes.int()]


def divisor(scale: Tensor) -> Tensor:
    """What brings values to units of a scale; a group without extent has scale 0, and any code will do."""
    return scale.masked_fill(scale == 0, torch.inf)
