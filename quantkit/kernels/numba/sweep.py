"""The sweep of `quantkit.quantizers.ldlq.sweep` on the processor: blocks of columns are rounded sixteen rows at a time,
and matrix products carry the errors from block to block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.kernels.backend import FixedScales
from quantkit.kernels.numba.grid_lanes import (
    Levels,
    flat,
    levels_of,
    nearest,
    quotient,
    store_codes,
    store_part,
    take,
    transposed,
)
from quantkit.kernels.numba.lanes import ROWS, fma, kernel, load, splat, store
from quantkit.kernels.numba.threads import Spread, spread_over
from quantkit.kernels.numba.tile import Floats

_BLOCK = 128  # columns that one call of the kernel rounds: their sixteen rows stay in the first cache


@dataclass(frozen=True, slots=True)
class _Sweep:
    """A sweep under way. moved and error (B, in, out) in layout order: w', and the target until a column is rounded,
    w - q afterwards. codes (B, in, out) uint8 in storage order. scale, zeros, offsets (B, groups, out); the latter two
    without entries if the grid has none. loss (B, out) likewise."""

    moved: Tensor
    error: Tensor
    codes: Tensor
    layout: Tensor
    lower: Tensor
    pivots: Tensor
    scale: Tensor
    zeros: Tensor
    offsets: Tensor
    levels: Levels
    loss: Tensor
    spread: Spread


def sweep(
    grid: FixedScales, target: Tensor, layout: Tensor, lower: Tensor, pivots: Tensor, loss: Tensor | None
) -> Tensor:
    """The arguments of `quantkit.quantizers.ldlq.sweep.sweep`, with the parts of its factor."""
    target = target.detach()
    moved = in_layout(target, layout)
    nothing = target.new_empty(0)
    lost = nothing if loss is None else loss.contiguous()
    with spread_over(torch.get_num_threads()) as spread:
        work = _Sweep(
            moved=moved,
            error=moved.clone(),
            codes=torch.empty(moved.shape, dtype=torch.uint8),
            layout=layout.contiguous(),
            lower=lower.contiguous(),
            pivots=pivots.contiguous(),
            scale=grid.scale.mT.contiguous(),
            zeros=grid.zero.mT.contiguous() if isinstance(grid.zero, Tensor) else nothing,
            offsets=nothing if grid.offset is None else grid.offset.mT.contiguous(),
            levels=levels_of(grid),
            loss=lost,
            spread=spread,
        )
        _sweep_span(work, 0, target.shape[-1])
    if loss is not None and lost is not loss:
        loss.copy_(lost)
    return transposed(work.codes)


def in_layout(matrix: Tensor, layout: Tensor) -> Tensor:
    """matrix (B, out, in) -> (B, in, out) with the places of ``layout`` (B, in)."""
    result = matrix.new_empty(matrix.mT.shape)
    for one, source, order in zip(result, matrix, layout, strict=True):
        torch.index_select(source.T.contiguous(), 0, order, out=one)
    return result


def _sweep_span(work: _Sweep, start: int, stop: int) -> None:
    """Round columns [start, stop), the last first, as the twin does it, but with wider blocks of columns at the end."""
    if stop - start <= _BLOCK:
        _round_span(work, start, stop)
        return
    middle = (start + stop) // 2
    _sweep_span(work, middle, stop)
    work.moved[:, start:middle].baddbmm_(work.lower[:, middle:stop, start:middle].mT, work.error[:, middle:stop])
    _sweep_span(work, start, middle)


def _round_span(work: _Sweep, start: int, stop: int) -> None:
    n_matrices, in_features, out_features = work.moved.shape
    tensors = [work.moved, work.error, work.codes, work.layout, work.lower, work.pivots]
    tensors += [work.scale, work.zeros, work.offsets, work.loss]
    sizes = in_features, out_features, work.scale.shape[1]
    arguments: list[Any] = [*map(flat, tensors), *work.levels, (start, stop), sizes]

    def run(first: int, last: int) -> None:
        everything: list[Any] = [*arguments, (first, last)]
        round_span(*everything)

    work.spread(run, n_matrices * -(-out_features // ROWS))


@kernel
def round_span(
    moved: Floats,
    error: Floats,
    codes: NDArray[np.uint8],
    layout: NDArray[np.int64],
    lower: Floats,
    pivots: Floats,
    scale: Floats,
    zeros: Floats,
    offsets: Floats,
    loss: Floats,
    zero: float,
    top: float,
    middles: Floats,
    table: Floats,
    span: tuple[int, int],
    sizes: tuple[int, int, int],
    tiles: tuple[int, int],
) -> None:
    """Round columns span[0] to span[1], the last first, in some tiles. All arrays are flat; sizes: in, out, groups."""
    start, stop = span
    in_features, out_features, groups = sizes
    by_matrix, group_size = (out_features + ROWS - 1) // ROWS, in_features // groups
    tile, spare = np.empty((stop - start) * ROWS, np.float32), np.zeros(ROWS, np.float32)
    for index in range(tiles[0], tiles[1]):
        matrix, row = index // by_matrix, index % by_matrix * ROWS
        width = min(ROWS, out_features - row)
        for column in range(start, stop):
            place = (matrix * in_features + column) * out_features + row
            store(tile, (column - start) * ROWS, take(moved, place, width, spare))
        lost = splat(0.0)
        for column in range(stop - 1, start - 1, -1):
            storage = layout[matrix * in_features + column]
            place = (matrix * in_features + column) * out_features + row
            coded = (matrix * in_features + storage) * out_features + row
            grouped = (matrix * groups + storage // group_size) * out_features + row
            unit = take(scale, grouped, width, spare)
            wanted, off = load(tile, (column - start) * ROWS), take(error, place, width, spare)
            if offsets.size:
                offset = take(offsets, grouped, width, spare)
                wanted, off = wanted - offset, off - offset
            origin = take(zeros, grouped, width, spare) if zeros.size else splat(zero)
            code, level = nearest(quotient(wanted, unit), origin, top, middles, table)
            store_codes(codes, coded, width, spare, code)
            off = off - level * unit
            store_part(error, place, width, spare, off)
            if loss.size:
                missed = wanted - level * unit
                lost = fma(missed * missed, splat(pivots[matrix * in_features + column]), lost)
            factors = (matrix * in_features + column) * in_features
            for earlier in range(start, column):
                pushed = fma(splat(lower[factors + earlier]), off, load(tile, (earlier - start) * ROWS))
                store(tile, (earlier - start) * ROWS, pushed)
        if loss.size:
            place = matrix * out_features + row
            store_part(loss, place, width, spare, take(loss, place, width, spare) + lost)
