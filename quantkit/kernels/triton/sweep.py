# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""The sweep of `quantkit.quantizers.ldlq.sweep` on a GPU: blocks of columns are rounded in registers, and TF32 products
carry the errors from block to block.

Rows are independent: one warp takes some rows of one matrix through a block of columns, SUB at a time. What columns of
the same block push is added in float32 arithmetic, what other blocks push in TF32 with float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from quantkit.kernels.backend import FixedScales, tensor_float32
from quantkit.kernels.triton.levels import inverse, nearest
from quantkit.kernels.triton.transpose import placed_twice, transposed

_BLOCK = 128  # columns that one launch rounds
_SUB = 16  # of them in registers at once
_ROWS = 64  # rows of a warp
_AT_ONCE = 8  # pushed columns that are fetched together


@triton.jit
def _round_block(
    moved, error, codes, lower, pivots, loss, layout, group, scale, zeros, offsets, table,
    zero, top, in_features, out_features, n_groups, start, stop,
    ZEROS: tl.constexpr, OFFSETS: tl.constexpr, LEVELS: tl.constexpr, LOSS: tl.constexpr,
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
    pivots += matrix * in_features
    loss += matrix * out_features
    lost = tl.zeros([ROWS], tl.float32)
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
            if LOSS:
                off = value - level * step
                lost += off * off * tl.load(pivots + place)
            tile += weights[:, None] * left[None, :]
            tl.store(error + place * out_features + rows, left, mask=inside)
            tl.store(codes + stored * out_features + rows, code.to(tl.uint8), mask=inside)
            step, weights, middle, shift = next_step, next_weights, next_middle, next_shift
        tl.debug_barrier()  # the errors that the next SUB columns read were stored by other threads
    if LOSS:
        tl.store(loss + rows, tl.load(loss + rows, mask=inside, other=0.0) + lost, mask=inside)


@dataclass(frozen=True, slots=True)
class _Sweep:
    """A sweep under way: moved (w'), error (the target until a column is rounded), codes (B, in, out), all in layout
    order but the codes; group of each place and its storage column (B, in) int32; scales as in `Grid`, transposed."""

    grid: FixedScales
    moved: Tensor
    error: Tensor
    codes: Tensor
    lower: Tensor
    pivots: Tensor
    loss: Tensor | None
    places: Tensor
    group: Tensor
    scale: Tensor
    zero: Tensor | float
    offset: Tensor | None


def sweep(
    grid: FixedScales, target: Tensor, layout: Tensor, lower: Tensor, pivots: Tensor, loss: Tensor | None = None
) -> Tensor:
    """Round the columns of target (B, out, in) float32 with error feedback -> codes (B, out, in) uint8, storage order.

    layout (B, in) int64, lower (B, in, in) and pivots (B, in) float32: as in `quantkit.quantizers.ldlq.factor.Factor`;
    loss (B, out) float32: tr(E H E^T) of each row is added to it.
    """
    in_features, zero, offset = target.shape[-1], grid.zero, grid.offset
    moved, error = placed_twice(target, layout)
    work = _Sweep(
        grid=grid,
        moved=moved,
        error=error,
        codes=torch.empty(moved.shape, dtype=torch.uint8, device=target.device),
        lower=lower,
        pivots=pivots,
        loss=loss,
        places=layout.int(),
        group=layout.div(in_features // grid.scale.shape[-1], rounding_mode="floor").int(),
        scale=transposed(grid.scale),
        zero=transposed(zero) if isinstance(zero, Tensor) else zero,
        offset=None if offset is None else transposed(offset),
    )
    with tensor_float32():
        _span(work, 0, in_features)
    return transposed(work.codes)


def _span(work: _Sweep, start: int, stop: int) -> None:
    """Round columns [start, stop), the last first."""
    if stop - start <= _BLOCK:
        _round(work, start, stop)
        return
    middle = start + (triton.cdiv(stop - start, _BLOCK) // 2) * _BLOCK
    _span(work, middle, stop)
    work.moved[:, start:middle].baddbmm_(work.lower[:, middle:stop, start:middle].mT, work.error[:, middle:stop])
    _span(work, start, middle)


def _round(work: _Sweep, start: int, stop: int) -> None:
    n_matrices, in_features, out_features = work.moved.shape
    table, zero, offset = work.grid.table, work.zero, work.offset
    with device_of(work.moved):
        _round_block[(triton.cdiv(out_features, _ROWS), n_matrices)](
            work.moved, work.error, work.codes, work.lower, work.pivots,
            work.pivots if work.loss is None else work.loss, work.places, work.group, work.scale,
            zero if isinstance(zero, Tensor) else work.scale, work.scale if offset is None else offset,
            work.scale if table is None else table, 0.0 if isinstance(zero, Tensor) else zero, float(work.grid.top),
            in_features, out_features, work.scale.shape[1], start, stop,
            ZEROS=isinstance(zero, Tensor), OFFSETS=offset is not None, LEVELS=0 if table is None else len(table),
            LOSS=work.loss is not None, SUB=_SUB, ROWS=_ROWS, AT_ONCE=_AT_ONCE, num_warps=1,
        )  # fmt: skip
