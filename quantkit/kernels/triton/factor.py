# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Cholesky of a batch of large matrices on a GPU. cuSOLVER factors them one after another, or, batched, slower still.

Left-looking, by panels of 512 and in them by blocks of 128: a kernel factors and inverts the block on the diagonal, a
product with that inverse solves the rows below, and products bring the next block or panel up to date.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from quantkit.kernels.backend import tensor_float32

_PANEL = 512
_BLOCK = 128
_PART = 32
_WARPS = 2
_COLUMNS = 1024


@triton.jit
def _permute(source, order, result, n, COLUMNS: tl.constexpr):
    """result[i, j] = source[order[i], order[j]] for j <= i; what lies above the diagonal stays undefined."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    matrix = tl.program_id(1).to(tl.int64)
    order += matrix * n
    source += matrix * n * n + tl.load(order + row).to(tl.int64) * n
    result += matrix * n * n + row.to(tl.int64) * n
    for start in range(0, row + 1, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        from_column = tl.load(order + columns, mask=columns <= row, other=0)
        values = tl.load(source + from_column, mask=columns <= row, other=0.0)
        tl.store(result + columns, values, mask=columns <= row)


@triton.jit
def _scale_columns(matrix, divisors, n, COLUMNS: tl.constexpr):
    """matrix[i, j] /= divisors[j] for j <= i."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    matrix += tl.program_id(1).to(tl.int64) * n * n + row.to(tl.int64) * n
    divisors += tl.program_id(1).to(tl.int64) * n
    for start in range(0, row + 1, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        divisor = tl.load(divisors + columns, mask=columns <= row, other=1.0)
        values = tl.load(matrix + columns, mask=columns <= row, other=0.0)
        tl.store(matrix + columns, values / divisor, mask=columns <= row)


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
        per_root = 1.0 / tl.sqrt_rn(tl.sum(tl.where(line == k, pivots, 0.0), axis=0))
        factor = pivots * per_root
        solved = solved * per_root
        tl.store(matrix + (start + line) * n + start + k, factor, mask=(line >= k) & (start + line < n))
        below = tl.where(line > k, factor, 0.0)
        values -= below[:, None] * below[None, :]
        inverse = tl.where(row == k, solved[None, :], inverse - below[:, None] * solved[None, :])
    return inverse


@triton.jit
def _block(matrix, stride, n_rows, n_columns, first_row, first_column, SIZE: tl.constexpr):
    """A block, zeros beyond the edges."""
    rows, columns = first_row + tl.arange(0, SIZE), first_column + tl.arange(0, SIZE)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(matrix + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _keep(matrix, stride, n_rows, n_columns, first_row, first_column, values, SIZE: tl.constexpr):
    rows, columns = first_row + tl.arange(0, SIZE), first_column + tl.arange(0, SIZE)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(matrix + rows[:, None] * stride + columns[None, :], values, mask=inside)
    tl.debug_barrier()  # other threads read it


@triton.jit
def _mirrored(matrix, n, start, SIZE: tl.constexpr):
    """A block on the diagonal, its lower half mirrored; ones on the diagonal beyond the edge of the matrix."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    high, low = tl.maximum(row, column), tl.minimum(row, column)
    values = tl.load(matrix + (start + high) * n + start + low, mask=start + high < n, other=0.0)
    return tl.where(start + high < n, values, tl.where(row == column, 1.0, 0.0))


@triton.jit
def _factor_diagonal(matrices, inverses, n, start, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """Factor the diagonal block of SIZE * PARTS columns at ``start`` and keep the inverse of its factor.

    Two warps do all of it: the columns of a part follow one another, and barriers between more warps cost more than
    they bring. The parts' products are error-compensated TF32.
    """
    width = SIZE * PARTS
    matrices += tl.program_id(0).to(tl.int64) * n * n
    inverses += tl.program_id(0).to(tl.int64) * width * width
    for part in range(PARTS):
        at = start + part * SIZE
        own = _mirrored(matrices, n, at, SIZE)
        for done in range(part):
            left = _block(matrices, n, n, n, at, start + done * SIZE, SIZE)
            own -= tl.dot(left, tl.trans(left), input_precision="tf32x3")
        inverse = _eliminate(own, matrices, n, at, SIZE)
        _keep(inverses, width, width, width, part * SIZE, part * SIZE, inverse, SIZE)
        for below in range(part + 1, PARTS):
            values = _block(matrices, n, n, n, start + below * SIZE, at, SIZE)
            for done in range(part):
                left = _block(matrices, n, n, n, start + below * SIZE, start + done * SIZE, SIZE)
                above = _block(matrices, n, n, n, at, start + done * SIZE, SIZE)
                values -= tl.dot(left, tl.trans(above), input_precision="tf32x3")
            values = tl.dot(values, tl.trans(inverse), input_precision="tf32x3")
            _keep(matrices, n, n, n, start + below * SIZE, at, values, SIZE)
        for done in range(part):  # (L^-1)[part, done] = -inverse (sum of L[part, j] (L^-1)[j, done])
            total = tl.zeros([SIZE, SIZE], tl.float32)
            for j in range(done, part):
                left = _block(matrices, n, n, n, at, start + j * SIZE, SIZE)
                right = _block(inverses, width, width, width, j * SIZE, done * SIZE, SIZE)
                total += tl.dot(left, right, input_precision="tf32x3")
            total = -tl.dot(inverse, total, input_precision="tf32x3")
            _keep(inverses, width, width, width, part * SIZE, done * SIZE, total, SIZE)


def permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Symmetric (B, n, n) float32 with rows and columns in ``order`` (B, n) int64, its lower triangle only."""
    result = torch.empty_like(matrix)
    n = matrix.shape[-1]
    with device_of(matrix):
        _permute[(n, len(matrix))](matrix, order.int(), result, n, COLUMNS=_COLUMNS, num_warps=4)
    return result


def factored(hessian: Tensor, layout: Tensor) -> tuple[Tensor, Tensor] | None:
    """H = R D R^T of (B, n, n) float32 in the order of layout (B, n) int64: R below the diagonal, D (B, n). None if one
    is not positive definite: what TF32 makes of a pivot gets a second chance in float32 first."""
    for tf32 in (True, False):
        lower = permuted(hessian, layout)
        cholesky_(lower, tf32=tf32)
        root = torch.diagonal(lower, dim1=-2, dim2=-1).clone()
        if root.isfinite().all():
            n = lower.shape[-1]
            with device_of(lower):
                _scale_columns[(n, len(lower))](lower, root, n, COLUMNS=_COLUMNS, num_warps=4)
            return lower, root.square_()
    return None


def cholesky_(matrix: Tensor, *, tf32: bool) -> None:
    """Overwrite the lower triangle of (B, n, n) float32 with its Cholesky factor; NaN on the diagonal says that a
    matrix was not positive definite. ``tf32``: for the matrix products, else float32."""
    n_matrices, n, _ = matrix.shape
    inverses = matrix.new_zeros(n_matrices, _BLOCK, _BLOCK)
    with tensor_float32(tf32):
        for first in range(0, n, _PANEL):
            end = min(first + _PANEL, n)
            if first:
                _subtract_done(matrix, first, end, 0)
            for start in range(first, end, _BLOCK):
                stop = min(start + _BLOCK, end)
                if start > first:
                    _subtract_done(matrix, start, stop, first)
                with device_of(matrix):
                    _factor_diagonal[(n_matrices,)](
                        matrix, inverses, n, start, SIZE=_PART, PARTS=_BLOCK // _PART, num_warps=_WARPS
                    )
                if stop < n:
                    below = matrix[:, stop:, start:stop]
                    below.copy_(below @ inverses.mT)


def _subtract_done(matrix: Tensor, start: int, stop: int, first: int) -> None:
    """Bring columns [start, stop) up to date with the factored columns [first, start)."""
    left = matrix[:, start:, first:start]
    matrix[:, start:, start:stop].baddbmm_(left, left[:, : stop - start].mT, alpha=-1)
