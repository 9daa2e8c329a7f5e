# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""The sweep of `quantkit.quantizers.ldlq` on a GPU: blocks of columns are rounded in registers, and TF32 products carry
the errors from block to block.

Rows are independent: one warp takes some rows of one matrix through a block of columns, SUB at a time. What columns of
the same block push is added in float32 arithmetic, what other blocks push in TF32 with float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.cuda import FixedScales, tensor_float32
from quantkit.kernels.levels_triton import inverse, nearest
from quantkit.kernels.transpose_triton import placed, transposed

_BLOCK = 128  # columns that one launch rounds
_SUB = 32  # of them in registers at once
_ROWS = 32  # rows of a warp
_AT_ONCE = 8  # pushed columns that are fetched together


@triton.jit
def _round_block(
    moved, error, codes, lower, layout, group, scale, zeros, offsets, table,
    zero, top, in_features, out_features, n_groups, start, stop,
    ZEROS: tl.constexpr, OFFSETS: tl.constexpr, LEVELS: tl.constexpr,
    SUB: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Round columns [start, stop), the last first. See `sweep` for the arrays."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    matrix = tl.program_id(1).to(tl.int64)
    moved += matrix * in_features * out_features
    error += matrix * in_features * out_features
    codes += matrix * in_features * out_features
    lower += matrix * in_features * in_features
    layout += matrix * in_features
    group += matrix * in_features
    scale += matrix * n_groups * out_features
    zeros += matrix * n_groups * out_features
    offsets += matrix * n_groups * out_features
    columns = tl.arange(0, SUB)
    n_subs = tl.cdiv(stop - start, SUB)
    for done in range(n_subs):
        sub = start + (n_subs - 1 - done) * SUB
        places = sub + columns
        exists = places < stop
        tile = tl.load(
            moved + places[:, None] * out_features + rows[None, :], mask=exists[:, None] & inside[None, :], other=0.0
        )
        for later in range(sub + SUB, stop, AT_ONCE):
            for k in tl.static_range(AT_ONCE):
                weights = tl.load(
                    lower + (later + k) * in_features + places, mask=exists & (later + k < stop), other=0.0
                )
                pushed = tl.load(error + (later + k) * out_features + rows, mask=inside & (later + k < stop), other=0.0)
                tile += weights[:, None] * pushed[None, :]
        last = tl.minimum(sub + SUB, stop) - 1
        # What a column needs is fetched while the one before it is rounded: only w' has to be waited for.
        at = tl.load(group + last) * out_features
        step = tl.load(scale + at + rows, mask=inside, other=0.0)
        targets = tl.load(
            error + places[:, None] * out_features + rows[None, :], mask=exists[:, None] & inside[None, :], other=0.0
        )
        weights = tl.load(lower + last * in_features + places, mask=places < last, other=0.0)
        middle = zero
        if ZEROS:
            middle = tl.load(zeros + at + rows, mask=inside, other=0.0)
        shift = 0.0
        if OFFSETS:
            shift = tl.load(offsets + at + rows, mask=inside, other=0.0)
        at = tl.load(group + tl.maximum(last - 1, sub)) * out_features
        for passed in range(last + 1 - sub):
            place = last - passed
            after = tl.maximum(place - 1, sub)
            next_step = tl.load(scale + at + rows, mask=inside, other=0.0)
            next_weights = tl.load(lower + after * in_features + places, mask=places < after, other=0.0)
            next_middle = middle
            if ZEROS:
                next_middle = tl.load(zeros + at + rows, mask=inside, other=0.0)
            next_shift = shift
            if OFFSETS:
                next_shift = tl.load(offsets + at + rows, mask=inside, other=0.0)
            at = tl.load(group + tl.maximum(place - 2, sub)) * out_features
            stored = tl.load(layout + place)

            here = columns[:, None] == place - sub
            value = tl.sum(tl.where(here, tile, 0.0), axis=0)
            wanted = tl.sum(tl.where(here, targets, 0.0), axis=0)
            if OFFSETS:
                value -= shift
                wanted -= shift
            code, level = nearest(value * inverse(step), middle, top, table, LEVELS)
            left = wanted - level * step
            tile += weights[:, None] * left[None, :]
            tl.store(error + place * out_features + rows, left, mask=inside)
            tl.store(codes + stored * out_features + rows, code.to(tl.uint8), mask=inside)
            step, weights, middle, shift = next_step, next_weights, next_middle, next_shift
        tl.debug_barrier()  # the errors that the next SUB columns read were stored by other threads


def sweep(grid: FixedScales, target: Tensor, layout: Tensor, lower: Tensor) -> Tensor:
    """Round the columns of target (B, out, in) float32 with error feedback -> codes (B, out, in) uint8, storage order.

    layout (B, in) int64 and lower (B, in, in) float32: as in `quantkit.quantizers.ldlq.Factor`.
    """
    n_matrices, out_features, in_features = target.shape
    n_groups = grid.scale.shape[-1]
    moved, error = placed(target, layout)
    codes = torch.empty(moved.shape, dtype=torch.uint8, device=target.device)
    group = layout.div(in_features // n_groups, rounding_mode="floor").int()
    places = layout.int()
    scale, zero, offset, table = transposed(grid.scale), grid.zero, grid.offset, grid.table
    zeros = transposed(zero) if isinstance(zero, Tensor) else scale
    offsets = scale if offset is None else transposed(offset)
    programs = (triton.cdiv(out_features, _ROWS), n_matrices)

    def span(start: int, stop: int) -> None:
        if stop - start <= _BLOCK:
            _round_block[programs](
                moved, error, codes, lower, places, group, scale, zeros, offsets, scale if table is None else table,
                0.0 if isinstance(zero, Tensor) else zero, float(grid.top),
                in_features, out_features, n_groups, start, stop,
                ZEROS=isinstance(zero, Tensor), OFFSETS=offset is not None, LEVELS=0 if table is None else len(table),
                SUB=_SUB, ROWS=_ROWS, AT_ONCE=_AT_ONCE, num_warps=1,
            )  # fmt: skip
            return
        middle = start + (triton.cdiv(stop - start, _BLOCK) // 2) * _BLOCK
        span(middle, stop)
        moved[:, start:middle].baddbmm_(lower[:, middle:stop, start:middle].mT, error[:, middle:stop])
        span(start, middle)

    with tensor_float32():
        span(0, in_features)
    return transposed(codes)
