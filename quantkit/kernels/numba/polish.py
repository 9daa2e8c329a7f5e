"""The coordinate descent of `quantkit.quantizers.ldlq.sweep.polish` on the processor.

Groups are taken in the twin's order, but the gradient E H is made anew for a panel of columns at a time, from the
errors as they then are, instead of kept up to date everywhere: half of the products' work, and none of it in narrow
ones. Products are torch's, all else runs sixteen rows at a time.
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

_PANEL = 512  # columns whose gradient is made at once
_BLOCK = 128  # columns that one call of the kernel moves: their sixteen rows stay in the first cache

Result = tuple[Tensor, Tensor, "Tensor | None", Tensor]
"""codes (B, out, in) uint8, scales and offsets (B, out, groups), loss (B, out)."""


@dataclass(frozen=True, slots=True)
class _Descent:
    """A polish under way. error, levels, codes (B, in, out), scales, offsets, zeros (B, groups, out), the latter two
    without entries if the grid has none; diagonal and row_sums (B, in): of the Hessian, and sums of each row over the
    columns of its group."""

    grid: FixedScales
    hessian: Tensor
    diagonal: Tensor
    row_sums: Tensor
    error: Tensor
    levels: Tensor
    codes: Tensor
    scales: Tensor
    offsets: Tensor
    zeros: Tensor
    constants: Levels
    spread: Spread

    @property
    def group_size(self) -> int:
        return self.error.shape[1] // self.scales.shape[1]

    @property
    def tiles(self) -> int:
        return len(self.error) * -(-self.error.shape[2] // ROWS)


def polish(grid: FixedScales, target: Tensor, codes: Tensor, hessian: Tensor, rounds: int) -> Result:
    """The arguments of `quantkit.quantizers.ldlq.sweep.polish`."""
    with spread_over(torch.get_num_threads()) as spread:
        work = _started(grid, target.detach(), codes, hessian.contiguous(), spread)
        loss = (work.error * (work.hessian @ work.error)).sum(1) if rounds == 0 else torch.empty(0)
        for _ in range(rounds):
            loss = _descend(work)
    offsets = None if grid.offset is None else transposed(work.offsets)
    return transposed(work.codes), transposed(work.scales), offsets, loss


def _started(grid: FixedScales, target: Tensor, codes: Tensor, hessian: Tensor, spread: Spread) -> _Descent:
    nothing = target.new_empty(0)
    # Copies even where the layout is this one already: they move, the arguments stay.
    scales, moved = transposed(grid.scale), transposed(codes)
    size = target.shape[-1] // scales.shape[1]
    zeros = grid.zero.mT.contiguous() if isinstance(grid.zero, Tensor) else nothing
    levels = grid.table[moved.int()] if grid.table is not None else moved.float()
    if grid.table is None:
        levels -= zeros.repeat_interleave(size, 1) if isinstance(grid.zero, Tensor) else grid.zero
    error = torch.addcmul(target.mT.contiguous(), levels, scales.repeat_interleave(size, 1), value=-1)
    offsets, row_sums = nothing, nothing
    if grid.offset is not None:
        offsets = transposed(grid.offset)
        error -= offsets.repeat_interleave(size, 1)
        blocks = hessian.unflatten(1, (-1, size)).unflatten(-1, (-1, size)).diagonal(dim1=1, dim2=3)
        row_sums = blocks.sum(-2).mT.flatten(1).contiguous()
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1).contiguous()
    return _Descent(
        grid, hessian, diagonal, row_sums, error, levels, moved, scales, offsets, zeros, levels_of(grid), spread
    )


def _descend(work: _Descent) -> Tensor:
    """One round -> the loss after it (B, out)."""
    hessian, error = work.hessian, work.error
    in_features, size = error.shape[1], work.group_size
    panel = max(size, _PANEL // size * size)
    loss = error.new_zeros(error.shape[0], error.shape[2])
    for first in range(0, in_features, panel):
        last = min(first + panel, in_features)
        # Errors of columns before the panel are final: half of what the loss needs.
        final = hessian[:, first:last, :first] @ error[:, :first]
        gradient = torch.baddbmm(final, hessian[:, first:last, first:], error[:, first:])
        for start in range(first, last, size):
            change = _move_group(work, gradient, start - first, start)
            if start + size < last:
                curvature = hessian[:, start + size : last, start : start + size]
                gradient[:, start + size - first :].baddbmm_(curvature, change)
        own = torch.baddbmm(final, hessian[:, first:last, first:last], error[:, first:last], beta=2)
        loss += own.mul_(error[:, first:last]).sum(1)
    return loss


def _move_group(work: _Descent, gradient: Tensor, inside: int, start: int) -> Tensor:
    """Move scale, offset and codes of one group; the panel's gradient (B, panel, out), which has the group from place
    ``inside`` on, need not follow -> how the group's errors change (B, size, out)."""
    size, grid = work.group_size, work.grid
    group, stop = start // size, start + size
    through = work.hessian[:, start:stop, start:stop] @ work.levels[:, start:stop]
    sums = _measured(work, gradient, through, inside, start)
    curvature, slope, through_sum, gradient_sum = sums.unbind(1)
    scale = work.scales[:, group]
    step = _if_better(scale, curvature, slope, grid.nearest_scale(group, _wanted(scale, curvature, slope)))
    scale += step
    shift = gradient.new_empty(0)
    if work.offsets.numel():
        offset = work.offsets[:, group]
        curvature = work.row_sums[:, start:stop].sum(-1, keepdim=True).expand_as(offset)
        slope = gradient_sum - step * through_sum
        shift = _if_better(offset, curvature, slope, grid.nearest_offset(group, _wanted(offset, curvature, slope)))
        offset += shift
    change, moves = torch.empty_like(through), torch.empty_like(through)
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        _move_codes(work, gradient, through, change, moves, step, shift, (first, last), inside, start)
        if last < size:
            curvature = work.hessian[:, start + last : stop, start + first : start + last]
            gradient[:, inside + last : inside + size].baddbmm_(curvature, moves[:, first:last])
    return change


def _wanted(now: Tensor, curvature: Tensor, slope: Tensor) -> Tensor:
    return now + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)


def _if_better(now: Tensor, curvature: Tensor, slope: Tensor, wanted: Tensor) -> Tensor:
    """The step of scales or offsets (B, out) where it lowers the loss, else 0."""
    step = wanted - now
    return torch.where((step * (step * curvature - 2 * slope) < 0) & (curvature > 0), step, 0.0).contiguous()


def _measured(work: _Descent, gradient: Tensor, through: Tensor, inside: int, start: int) -> Tensor:
    """(B, 4, out): sums over the group of levels * through, levels * gradient, through and gradient."""
    in_features, out_features = work.error.shape[1:]
    sums = gradient.new_empty(len(gradient), 4, out_features)
    arrays = flat(gradient), flat(through), flat(work.levels), flat(sums)
    sizes = in_features, out_features, gradient.shape[1], work.group_size
    # Not in threads: handing it over takes as long.
    measure_group(*arrays, sizes, inside, start, (0, work.tiles))
    return sums


@kernel
def measure_group(
    gradient: Floats,
    through: Floats,
    levels: Floats,
    sums: Floats,
    sizes: tuple[int, int, int, int],
    inside: int,
    start: int,
    tiles: tuple[int, int],
) -> None:
    """See `_measured`; all arrays are flat; sizes: in, out, panel, group."""
    in_features, out_features, panel, size = sizes
    by_matrix, spare = (out_features + ROWS - 1) // ROWS, np.zeros(ROWS, np.float32)
    for index in range(tiles[0], tiles[1]):
        matrix, row = index // by_matrix, index % by_matrix * ROWS
        width = min(ROWS, out_features - row)
        curvature, slope, through_sum, gradient_sum = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        for column in range(size):
            g = take(gradient, (matrix * panel + inside + column) * out_features + row, width, spare)
            t = take(through, (matrix * size + column) * out_features + row, width, spare)
            level = take(levels, (matrix * in_features + start + column) * out_features + row, width, spare)
            curvature, slope = fma(level, t, curvature), fma(level, g, slope)
            through_sum, gradient_sum = through_sum + t, gradient_sum + g
        place = matrix * 4 * out_features + row
        store_part(sums, place, width, spare, curvature)
        store_part(sums, place + out_features, width, spare, slope)
        store_part(sums, place + 2 * out_features, width, spare, through_sum)
        store_part(sums, place + 3 * out_features, width, spare, gradient_sum)


def _move_codes(
    work: _Descent,
    gradient: Tensor,
    through: Tensor,
    change: Tensor,
    moves: Tensor,
    step: Tensor,
    shift: Tensor,
    block: tuple[int, int],
    inside: int,
    start: int,
) -> None:
    """Let the block's columns of one group follow the steps of scale and offset, then move their codes. ``block``:
    within the group. Fills its part of ``change`` (of errors) and ``moves`` (the share of codes in it)."""
    tensors = [gradient, through, work.hessian, work.diagonal, work.row_sums, work.error, work.levels, work.codes]
    tensors += [change, moves, work.scales, work.zeros, step, shift]
    in_features, out_features = work.error.shape[1:]
    sizes = in_features, out_features, gradient.shape[1], work.group_size
    arguments: list[Any] = [*map(flat, tensors), *work.constants, sizes, block, inside, start]

    def run(first: int, last: int) -> None:
        everything: list[Any] = [*arguments, (first, last)]
        move_codes(*everything)

    work.spread(run, work.tiles)


@kernel
def move_codes(
    gradient: Floats,
    through: Floats,
    hessian: Floats,
    diagonal: Floats,
    row_sums: Floats,
    error: Floats,
    levels: Floats,
    codes: NDArray[np.uint8],
    change: Floats,
    moves: Floats,
    scales: Floats,
    zeros: Floats,
    steps: Floats,
    shifts: Floats,
    zero: float,
    top: float,
    middles: Floats,
    table: Floats,
    sizes: tuple[int, int, int, int],
    block: tuple[int, int],
    inside: int,
    start: int,
    tiles: tuple[int, int],
) -> None:
    """See `_move_codes`; all arrays are flat; sizes: in, out, panel, group."""
    in_features, out_features, panel, size = sizes
    by_matrix, groups = (out_features + ROWS - 1) // ROWS, in_features // size
    tile, spare = np.empty((block[1] - block[0]) * ROWS, np.float32), np.zeros(ROWS, np.float32)
    for index in range(tiles[0], tiles[1]):
        matrix, row = index // by_matrix, index % by_matrix * ROWS
        width = min(ROWS, out_features - row)
        step = take(steps, matrix * out_features + row, width, spare)
        shift = take(shifts, matrix * out_features + row, width, spare) if shifts.size else splat(0.0)
        for column in range(block[0], block[1]):
            g = take(gradient, (matrix * panel + inside + column) * out_features + row, width, spare)
            g = g - step * take(through, (matrix * size + column) * out_features + row, width, spare)
            if shifts.size:
                g = g - shift * row_sums[matrix * in_features + start + column]
            store(tile, (column - block[0]) * ROWS, g)
        grouped = (matrix * groups + start // size) * out_features + row
        scale = take(scales, grouped, width, spare)
        origin = take(zeros, grouped, width, spare) if zeros.size else splat(zero)
        for column in range(block[0], block[1]):
            of_matrix = matrix * in_features + start + column
            place, local = of_matrix * out_features + row, (matrix * size + column) * out_features + row
            old = take(levels, place, width, spare)
            wanted = quotient(load(tile, (column - block[0]) * ROWS) / diagonal[of_matrix], scale) + old
            code, level = nearest(wanted, origin, top, middles, table)
            store_codes(codes, place, width, spare, code)
            store_part(levels, place, width, spare, level)
            move = 0.0 - (level - old) * scale
            total = move - step * old - shift
            store_part(error, place, width, spare, take(error, place, width, spare) + total)
            store_part(change, local, width, spare, total)
            store_part(moves, local, width, spare, move)
            curvatures = of_matrix * in_features + start
            for later in range(column + 1, block[1]):
                at = (later - block[0]) * ROWS
                pushed = fma(splat(hessian[curvatures + later]), move, load(tile, at))
                store(tile, at, pushed)
