"""GPTQ's error feedback written as LDLQ (QuIP, arXiv 2307.13304, section 3; GPTQ, arXiv 2210.17323, algorithm 1: same
codes).

Columns are laid out by *rising* diag(H) and rounded from the last to the first. With the damped Hessian in that layout,
H = R D R^T (R unit lower triangular, from ONE Cholesky, no inverse), column k is rounded as

    w'_k = w_k + sum_{j>k} (w_j - q_j) R[j, k]          q_k = nearest level to w'_k

and the loss tr(E H E^T) is sum_k D_k (w'_k - q_k)^2. (The index-reversed form of U D U^T, so that nothing is flipped.)

Everything is batched over matrices of one shape: B experts at once. Float32 throughout; on a GPU with Triton the
kernels of `quantkit.kernels` do the same, with matrix products in TF32 and bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, backend_of
from quantkit.quantizers.ldlq.factor import Factor, columns_in
from quantkit.quantizers.ldlq.levels import Levels, divisor, fits_gpu_kernels
from quantkit.schemes.grid import Grid

_BLOCK = 16  # columns rounded one at a time; wider spans go through matrix products


def sweep(grid: Grid, target: Tensor, factor: Factor, loss: Tensor | None = None) -> Tensor:
    """Round the columns of ``target`` with error feedback on a fixed grid (groups stay where storage has them: static
    groups).

    target (B, out, in) float32 -> codes (B, out, in) uint8 in storage order. ``loss`` (B, out) float32: tr(E H E^T) of
    each row is added to it.
    """
    backend = backend_of(target)
    if backend is Backend.TRITON and fits_gpu_kernels(grid):
        from quantkit.kernels.triton import sweep as sweep_triton

        return sweep_triton.sweep(grid, target, factor.layout, factor.lower, factor.pivots, loss)
    if backend is Backend.NUMBA:
        from quantkit.kernels.numba import sweep as sweep_numba

        return sweep_numba.sweep(grid, target, factor.layout, factor.lower, factor.pivots, loss)
    in_features = target.shape[-1]
    group = factor.layout.div(in_features // grid.scale.shape[-1], rounding_mode="floor")  # of each place
    columns = _Columns(
        error=columns_in(target, factor.layout).mT.contiguous(),
        moved=columns_in(target, factor.layout).mT.contiguous(),
        scale=_columns_of_groups(grid.scale, group),
        zero=_columns_of_groups(grid.zero, group) if isinstance(grid.zero, Tensor) else grid.zero,
        offset=None if grid.offset is None else _columns_of_groups(grid.offset, group),
        levels=Levels(grid),
        codes=torch.empty(target.mT.shape, dtype=torch.uint8, device=target.device),
        loss=loss,
    )
    _sweep_span(columns, factor, 0, in_features)
    return columns_in(columns.codes.mT, factor.layout.argsort(-1))


@dataclass(frozen=True, slots=True)
class _Columns:
    """A sweep under way, transposed so that one column of the weight is contiguous. All are (B, in, out) in
    layout order.

    ``moved`` holds w', ``error`` the target until a column is rounded and w - q afterwards; ``loss`` as in `sweep`.
    """

    error: Tensor
    moved: Tensor
    scale: Tensor
    zero: Tensor | float
    offset: Tensor | None
    levels: Levels
    codes: Tensor
    loss: Tensor | None


def _columns_of_groups(values: Tensor, group: Tensor) -> Tensor:
    """values (B, out, groups), group (B, in) -> (B, in, out): the scale of each place."""
    out_features = values.shape[-2]
    return values.mT.contiguous().gather(-2, group.unsqueeze(-1).expand(*group.shape, out_features))


def _sweep_span(columns: _Columns, factor: Factor, start: int, stop: int) -> None:
    """Round columns [start, stop), the last first. Halving puts nearly all of the feedback into matrix products."""
    if stop - start <= _BLOCK:
        for column in range(stop - 1, start - 1, -1):
            _round_column(columns, factor, column, start)
        return
    middle = (start + stop) // 2
    _sweep_span(columns, factor, middle, stop)
    columns.moved[:, start:middle].baddbmm_(
        factor.lower[:, middle:stop, start:middle].mT, columns.error[:, middle:stop]
    )
    _sweep_span(columns, factor, start, middle)


def _round_column(columns: _Columns, factor: Factor, column: int, start: int) -> None:
    """Round one column and push its error to the rest of its block, [start, column)."""
    scale = columns.scale[:, column]
    zero = columns.zero[:, column] if isinstance(columns.zero, Tensor) else columns.zero
    wanted, error = columns.moved[:, column], columns.error[:, column]
    if columns.offset is not None:
        wanted = wanted - columns.offset[:, column]
        error -= columns.offset[:, column]
    codes, levels = columns.levels.round(wanted / divisor(scale), zero)
    columns.codes[:, column] = codes
    error.addcmul_(levels, scale, value=-1)
    if columns.loss is not None:
        off = torch.addcmul(wanted, levels, scale, value=-1)
        columns.loss.addcmul_(off.square_(), factor.pivots[:, column, None])
    if column > start:
        weights = factor.lower[:, column, start:column, None]
        columns.moved[:, start:column].addcmul_(weights, error.unsqueeze(1))
