# pyright: basic, reportMissingImports=false
"""Cholesky of a batch of large matrices on a GPU. cuSOLVER factors them one after another, or, batched, slower still.

Left-looking by panels of 512: a TF32 product brings a panel up to date. Inside it, by blocks of 128 in float32: a
kernel factors and inverts the block on the diagonal, and a product with that inverse solves the rows below.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.cuda import tensor_float32

_PANEL = 512
_BLOCK = 128
_HALF = 64
_WARPS = 8


@triton.jit
def _permute(source, order, result, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """result[i, j] = source[order[i], order[j]] for j <= i; what lies above the diagonal blocks stays undefined."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix = tl.program_id(1).to(tl.int64)
    source += matrix * n * n
    result += matrix * n * n
    order += matrix * n
    from_row = tl.load(order + rows, mask=rows < n, other=0).to(tl.int64) * n
    for start in range(0, tl.minimum((tl.program_id(0) + 1) * ROWS, n), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = (rows < n)[:, None] & (columns < n)[None, :]
        from_column = tl.load(order + columns, mask=columns < n, other=0)
        values = tl.load(source + from_row[:, None] + from_column[None, :], mask=mask, other=0.0)
        tl.store(result + rows.to(tl.int64)[:, None] * n + columns[None, :], values, mask=mask)


@triton.jit
def _eliminate(values, matrix, n, start, SIZE: tl.constexpr):
    """Symmetric values (SIZE, SIZE) of the diagonal block at ``start`` -> the inverse of its Cholesky factor L, in
    registers; L goes to the matrix column by column."""
    line = tl.arange(0, SIZE)
    row, column = line[:, None], line[None, :]
    inverse = tl.where(row == column, 1.0, 0.0)
    for k in range(SIZE):
        pivots = tl.sum(tl.where(row == k, values, 0.0), axis=0)  # row k, as good as column k
        solved = tl.sum(tl.where(row == k, inverse, 0.0), axis=0)
        root = tl.sqrt_rn(tl.sum(tl.where(line == k, pivots, 0.0), axis=0))
        factor = pivots * (1.0 / root)
        solved = solved * (1.0 / root)
        tl.store(
            matrix + (start + line) * n + start + k, factor, mask=(line >= k) & (start + line < n) & (start + k < n)
        )
        below = tl.where(line > k, factor, 0.0)
        values -= below[:, None] * below[None, :]
        inverse = tl.where(row == k, solved[None, :], inverse - below[:, None] * solved[None, :])
    return inverse


@triton.jit
def _mirrored(matrix, n, start, SIZE: tl.constexpr):
    """A block on the diagonal, its lower half mirrored; ones on the diagonal beyond the edge of the matrix."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    high, low = tl.maximum(row, column), tl.minimum(row, column)
    values = tl.load(matrix + (start + high) * n + start + low, mask=start + high < n, other=0.0)
    return tl.where(start + high < n, values, tl.where(row == column, 1.0, 0.0))


@triton.jit
def _factor_diagonal(matrices, inverses, n, start, PRECISION: tl.constexpr, HALF: tl.constexpr):
    """Factor the diagonal block of 2 HALF columns at ``start`` and keep the inverse of its factor."""
    matrices += tl.program_id(0).to(tl.int64) * n * n
    inverses += tl.program_id(0).to(tl.int64) * 4 * HALF * HALF
    line = tl.arange(0, HALF)
    corner = inverses + line[:, None] * (2 * HALF) + line[None, :]
    across_at = matrices + (start + HALF + line)[:, None] * n + (start + line)[None, :]
    inside = (start + HALF + line < n)[:, None]
    upper = _eliminate(_mirrored(matrices, n, start, HALF), matrices, n, start, HALF)
    tl.store(corner, upper)
    tl.store(corner + HALF, tl.zeros([HALF, HALF], tl.float32))
    across = tl.dot(tl.load(across_at, mask=inside, other=0.0), tl.trans(upper), input_precision=PRECISION)
    tl.store(across_at, across, mask=inside)
    rest = _mirrored(matrices, n, start + HALF, HALF)
    rest -= tl.dot(across, tl.trans(across), input_precision=PRECISION)
    under = _eliminate(rest, matrices, n, start + HALF, HALF)
    tl.store(corner + 2 * HALF * HALF + HALF, under)
    across = tl.dot(under, across, input_precision=PRECISION)
    tl.debug_barrier()
    upper = tl.load(corner)  # rather than keep it in registers all the while
    tl.store(corner + 2 * HALF * HALF, -tl.dot(across, upper, input_precision=PRECISION))


def permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Symmetric (B, n, n) float32 with rows and columns in ``order`` (B, n) int64, its lower triangle only."""
    result = torch.empty_like(matrix)
    rows = 4
    _permute[(triton.cdiv(matrix.shape[-1], rows), len(matrix))](
        matrix, order.int(), result, matrix.shape[-1], ROWS=rows, COLUMNS=256, num_warps=4
    )
    return result


def cholesky_(matrix: Tensor, *, tf32: bool) -> None:
    """Overwrite the lower triangle of (B, n, n) float32 with its Cholesky factor; NaN on the diagonal tells that a
    matrix was not positive definite. ``tf32``: for the products between panels, 90 % of the work."""
    n_matrices, n, _ = matrix.shape
    inverses = matrix.new_empty(n_matrices, _BLOCK, _BLOCK)
    for first in range(0, n, _PANEL):
        end = min(first + _PANEL, n)
        if first:
            left = matrix[:, first:, :first]
            with tensor_float32(tf32):
                matrix[:, first:, first:end].baddbmm_(left, left[:, : end - first].mT, alpha=-1)
        with tensor_float32(False):
            for start in range(first, end, _BLOCK):
                stop = min(start + _BLOCK, end)
                if start > first:
                    left = matrix[:, start:, first:start]
                    matrix[:, start:, start:stop].baddbmm_(left, left[:, : stop - start].mT, alpha=-1)
                _factor_diagonal[(n_matrices,)](
                    matrix, inverses, n, start, PRECISION="tf32x3", HALF=_HALF, num_warps=_WARPS
                )
                if stop < n:
                    below = matrix[:, stop:, start:stop]
                    below.copy_(below @ inverses.mT)
