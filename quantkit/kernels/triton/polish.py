# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""The coordinate descent of `quantkit.quantizers.ldlq.sweep.polish` on a GPU.

Gradients are made anew for a panel of groups at a time, G = H[panel] E, in one product of bfloat16 factors with float32
sums: nothing of the size of a matrix is updated for every group. Within a panel the groups follow one another: one
kernel measures the best step of each row's scale (and offset), the grid says which values can be stored, one kernel
moves scale and codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from quantkit.kernels.backend import FixedScales, narrow_product, tensor_float32
from quantkit.kernels.triton.levels import inverse, nearest
from quantkit.kernels.triton.transpose import transposed

_PANEL = 512  # columns whose gradients are made at once
_SUB = 16  # columns in registers at once
_ROWS = 64  # rows of a warp, in the search for codes
_MEASURED = 32  # rows of a warp, in the measurement of steps
_AT_ONCE = 8
_TILE = 64
_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _begin(
    target, given, scale, zeros, offsets, table, error, narrow, levels, codes,
    zero, in_features, out_features, n_groups, size,
    ZEROS: tl.constexpr, OFFSETS: tl.constexpr, TABLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """target, given codes (B, out, in) -> error, levels, codes (B, in, out)."""
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    matrix = tl.program_id(2).to(tl.int64)
    start = matrix * in_features * out_features
    there = (rows < out_features)[:, None] & (columns < in_features)[None, :]
    cells = start + rows[:, None] * in_features + columns[None, :]
    wanted = tl.trans(tl.load(target + cells, mask=there, other=0.0))
    code = tl.trans(tl.load(given + cells, mask=there, other=0))
    back = (columns < in_features)[:, None] & (rows < out_features)[None, :]
    of_group = (matrix * n_groups + columns // size)[:, None] * out_features + rows[None, :]
    if TABLE:
        level = tl.load(table + code.to(tl.int32), mask=back, other=0.0)
    elif ZEROS:
        level = code.to(tl.float32) - tl.load(zeros + of_group, mask=back, other=0.0)
    else:
        level = code.to(tl.float32) - zero
    left = wanted - level * tl.load(scale + of_group, mask=back, other=0.0)
    if OFFSETS:
        left -= tl.load(offsets + of_group, mask=back, other=0.0)
    cells = start + columns[:, None] * out_features + rows[None, :]
    tl.store(error + cells, left, mask=back)
    tl.store(narrow + cells, left.to(tl.bfloat16), mask=back)
    tl.store(levels + cells, level, mask=back)
    tl.store(codes + cells, code, mask=back)


@triton.jit
def _measure(
    gradient, through, levels, sums, scale, step, limit,
    in_features, out_features, n_groups, width, start, size, column, group,
    DTYPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """By row: levels . through, levels . gradient, 1 . through, 1 . gradient. The group is [start, start + size), at
    ``column`` of gradient (B, width, out).

    Without a DTYPE they go to sums (B, 4, out). With one, scales are rounded to it: the step of the group's scale is
    taken where it lowers the loss, and kept in step (B, out).
    """
    matrix = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    levels += (matrix * in_features + start) * out_features + rows
    gradient += (matrix * width + column) * out_features + rows
    through += matrix * size * out_features + rows
    curvature = tl.zeros([ROWS], tl.float32)
    slope = tl.zeros([ROWS], tl.float32)
    through_sum = tl.zeros([ROWS], tl.float32)
    gradient_sum = tl.zeros([ROWS], tl.float32)
    for k in range(size):
        level = tl.load(levels + k * out_features, mask=inside, other=0.0)
        along = tl.load(through + k * out_features, mask=inside, other=0.0)
        down = tl.load(gradient + k * out_features, mask=inside, other=0.0)
        curvature += level * along
        slope += level * down
        through_sum += along
        gradient_sum += down
    if DTYPE is None:
        sums += matrix * 4 * out_features + rows
        tl.store(sums, curvature, mask=inside)
        tl.store(sums + out_features, slope, mask=inside)
        tl.store(sums + 2 * out_features, through_sum, mask=inside)
        tl.store(sums + 3 * out_features, gradient_sum, mask=inside)
    else:
        at = scale + (matrix * n_groups + group) * out_features + rows
        now = tl.load(at, mask=inside, other=0.0)
        wanted = now + slope / tl.maximum(curvature, 1.1754943508222875e-38)
        wanted = tl.minimum(tl.maximum(wanted, -limit), limit).to(DTYPE).to(tl.float32)
        taken = tl.where((wanted == 0) | (wanted != wanted), 1.0, wanted) - now
        taken = tl.where((taken * (taken * curvature - 2 * slope) < 0) & (curvature > 0), taken, 0.0)
        tl.store(at, now + taken, mask=inside)
        tl.store(step + matrix * out_features + rows, taken, mask=inside)


@triton.jit
def _move(
    gradient, through, error, narrow, levels, codes, change, moves, hessian, row_sums, scale, scale_step, offset_step,
    zeros, table, zero, top, in_features, out_features, n_groups, width, start, size, column, group,
    ZEROS: tl.constexpr, OFFSETS: tl.constexpr, LEVELS: tl.constexpr,
    SUB: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Take the steps of one group's scale and offset, then move each of its codes to the best level given all others.

    change (B, size, out): what the group's errors have changed by; moves: the part of it that the codes made.
    """
    matrix = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    gradient += (matrix * width + column) * out_features
    through += matrix * size * out_features
    change += matrix * size * out_features
    moves += matrix * size * out_features
    error += (matrix * in_features + start) * out_features
    narrow += (matrix * in_features + start) * out_features
    levels += (matrix * in_features + start) * out_features
    codes += (matrix * in_features + start) * out_features
    hessian += matrix * in_features * in_features + start * in_features + start
    row_sums += matrix * in_features + start
    at = matrix * out_features + rows
    scale = tl.load(scale + (matrix * n_groups + group) * out_features + rows, mask=inside, other=0.0)
    per_step = inverse(scale)
    step = tl.load(scale_step + at, mask=inside, other=0.0)
    shift = 0.0
    if OFFSETS:
        shift = tl.load(offset_step + at, mask=inside, other=0.0)
    middle = zero
    if ZEROS:
        middle = tl.load(zeros + (matrix * n_groups + group) * out_features + rows, mask=inside, other=0.0)
    columns = tl.arange(0, SUB)
    for sub in range(0, size, SUB):
        places = sub + columns
        exists = places < size
        mask = exists[:, None] & inside[None, :]
        cells = places[:, None] * out_features + rows[None, :]
        tile = tl.load(gradient + cells, mask=mask, other=0.0)
        tile -= tl.load(through + cells, mask=mask, other=0.0) * step[None, :]
        if OFFSETS:
            tile -= tl.load(row_sums + places, mask=exists, other=0.0)[:, None] * shift[None, :]
        for earlier in range(0, sub, AT_ONCE):
            for k in tl.static_range(AT_ONCE):
                weights = tl.load(hessian + (earlier + k) * in_features + places, mask=exists, other=0.0)
                moved = tl.load(moves + (earlier + k) * out_features + rows, mask=inside, other=0.0)
                tile -= weights[:, None] * moved[None, :]
        count = tl.minimum(SUB, size - sub)
        olds = tl.load(levels + cells, mask=mask, other=0.0)
        weights = tl.load(hessian + sub * in_features + places, mask=exists & (places > sub), other=0.0)
        pivot = tl.load(hessian + sub * in_features + sub)
        for passed in range(count):
            place = sub + passed
            after = tl.minimum(place + 1, sub + count - 1)
            next_weights = tl.load(hessian + after * in_features + places, mask=exists & (places > after), other=0.0)
            next_pivot = tl.load(hessian + after * in_features + after)
            here = columns[:, None] == passed
            slope = tl.sum(tl.where(here, tile, 0.0), axis=0)
            old = tl.sum(tl.where(here, olds, 0.0), axis=0)
            code, level = nearest(slope * (1.0 / pivot) * per_step + old, middle, top, table, LEVELS)
            moved = (level - old) * scale
            tile -= weights[:, None] * moved[None, :]
            changed = -old * step - shift - moved
            tl.store(levels + place * out_features + rows, level, mask=inside)
            tl.store(codes + place * out_features + rows, code.to(tl.uint8), mask=inside)
            tl.store(change + place * out_features + rows, changed, mask=inside)
            tl.store(moves + place * out_features + rows, moved, mask=inside)
            weights, pivot = next_weights, next_pivot
        tl.debug_barrier()  # the changes, and the moves that the next SUB columns read, were stored by other threads
        left = tl.load(error + cells, mask=mask, other=0.0) + tl.load(change + cells, mask=mask, other=0.0)
        tl.store(error + cells, left, mask=mask)
        tl.store(narrow + cells, left.to(tl.bfloat16), mask=mask)


@dataclass(frozen=True, slots=True)
class _Descent:
    """A polish under way. error, levels (B, in, out), scales, offsets, zero (B, groups, out) float32; codes uint8;
    hessian (B, in, in) float32, its row_sums within groups (B, in). narrow_error, narrow_hessian: in bfloat16, for
    gradients."""

    grid: FixedScales
    error: Tensor
    levels: Tensor
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    zero: Tensor | float
    hessian: Tensor
    row_sums: Tensor
    narrow_error: Tensor
    narrow_hessian: Tensor


Polished = tuple[Tensor, Tensor, "Tensor | None", Tensor]


def polish(grid: FixedScales, target: Tensor, codes: Tensor, hessian: Tensor, rounds: int) -> Polished:
    """target (B, out, in) float32, codes uint8 the same, hessian (B, in, in) -> codes, scale, offset (B, out, groups)
    and the loss tr(E H E^T) (B, out)."""
    scale, zero, offset, table = grid.scale, grid.zero, grid.offset, grid.table
    size = target.shape[-1] // scale.shape[-1]
    scales = transposed(scale)
    zeros = transposed(zero) if isinstance(zero, Tensor) else zero
    offsets = None if offset is None else transposed(offset)
    error, levels = (target.new_empty(target.mT.shape) for _ in range(2))
    moved = codes.new_empty(target.mT.shape)
    narrow = torch.empty_like(error, dtype=torch.bfloat16)
    with device_of(target):
        _begin[(triton.cdiv(target.shape[2], _TILE), triton.cdiv(target.shape[1], _TILE), len(target))](
            target.contiguous(), codes.contiguous(), scales, zeros if isinstance(zeros, Tensor) else scales,
            scales if offsets is None else offsets, scales if table is None else table, error, narrow, levels, moved,
            0.0 if isinstance(zeros, Tensor) else zeros, target.shape[2], target.shape[1], scales.shape[1], size,
            ZEROS=isinstance(zeros, Tensor), OFFSETS=offsets is not None, TABLE=table is not None, TILE=_TILE,
            num_warps=4,
        )  # fmt: skip
    row_sums = hessian if offsets is None else _row_sums(hessian, size)
    work = _Descent(grid, error, levels, moved, scales, offsets, zeros, hessian, row_sums, narrow, hessian.bfloat16())
    with tensor_float32():
        for _ in range(rounds):
            _descend(work)
    # A figure for reports: rounding to bfloat16 averages out.
    loss = (narrow_product(work.narrow_hessian, narrow) * error).sum(1)
    return transposed(moved), transposed(scales), None if offsets is None else transposed(offsets), loss


def _descend(work: _Descent) -> None:
    in_features = work.error.shape[1]
    size = in_features // work.scales.shape[1]
    panel = max(size, _PANEL // size * size)
    for first in range(0, in_features, panel):
        last = min(first + panel, in_features)
        gradient = narrow_product(work.narrow_hessian[:, first:last], work.narrow_error)
        for start in range(first, last, size):
            change = _move_group(work, gradient, first, start, size)
            if start + size < last:
                curvature = work.hessian[:, start + size : last, start : start + size]
                gradient[:, start + size - first :].baddbmm_(curvature, change)


def _row_sums(hessian: Tensor, size: int) -> Tensor:
    """(B, in): sums of each row over its own group's columns."""
    blocks = hessian.unflatten(1, (-1, size)).unflatten(-1, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3).sum(-2).mT.flatten(1).contiguous()


def _move_group(work: _Descent, gradient: Tensor, first: int, start: int, size: int) -> Tensor:
    """-> how the group's errors change (B, size, out); ``gradient`` (B, panel, out) stays."""
    n_matrices, in_features, out_features = work.error.shape
    group, width, grid = start // size, gradient.shape[1], work.grid
    through = work.hessian[:, start : start + size, start : start + size] @ work.levels[:, start : start + size]
    change, moves = torch.empty_like(through), torch.empty_like(through)
    sums = gradient.new_empty(n_matrices, 4, out_features)
    scale, step = work.scales[:, group], gradient.new_empty(n_matrices, out_features)
    dtype = None if work.offsets is not None else grid.scale_dtype
    with device_of(gradient):
        _measure[(triton.cdiv(out_features, _MEASURED), n_matrices)](
            gradient, through, work.levels, sums, work.scales, step, 0.0 if dtype is None else torch.finfo(dtype).max,
            in_features, out_features, work.scales.shape[1], width, start, size, start - first, group,
            DTYPE=_TRITON[dtype] if dtype else None, ROWS=_MEASURED, num_warps=1,
        )  # fmt: skip
    curvature, slope, through_sum, gradient_sum = sums.unbind(1)
    if dtype is None:
        step = _step(scale, curvature, slope, partial(grid.nearest_scale, group))
        scale += step
    shift = step
    if work.offsets is not None:
        curvature = work.row_sums[:, start : start + size].sum(-1, keepdim=True).expand_as(step)
        nearest_offset = partial(grid.nearest_offset, group)
        shift = _step(work.offsets[:, group], curvature, gradient_sum - step * through_sum, nearest_offset)
        work.offsets[:, group] += shift
    zeros = work.zero if isinstance(work.zero, Tensor) else work.scales
    with device_of(gradient):
        _move[(triton.cdiv(out_features, _ROWS), n_matrices)](
            gradient, through, work.error, work.narrow_error, work.levels, work.codes, change, moves, work.hessian,
            work.row_sums, work.scales, step, shift, zeros, work.scales if grid.table is None else grid.table,
            0.0 if isinstance(work.zero, Tensor) else work.zero, float(grid.top),
            in_features, out_features, work.scales.shape[1], width, start, size, start - first, group,
            ZEROS=isinstance(work.zero, Tensor), OFFSETS=work.offsets is not None,
            LEVELS=0 if grid.table is None else len(grid.table), SUB=_SUB, ROWS=_ROWS, AT_ONCE=_AT_ONCE, num_warps=1,
        )  # fmt: skip
    return change


def _step(now: Tensor, curvature: Tensor, slope: Tensor, nearest_value: Callable[[Tensor], Tensor]) -> Tensor:
    """The step of a scale or an offset (B, out) to the storable value nearest to the best, where that lowers the
    loss."""
    step = nearest_value(now + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)) - now
    return torch.where((step * (step * curvature - 2 * slope) < 0) & (curvature > 0), step, 0.0)
