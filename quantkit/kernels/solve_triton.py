# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Products with the inverse of a factored Hessian on a GPU: triangular solves by halving, all of it matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.cuda import tensor_float32
from quantkit.kernels.transpose_triton import placed, transposed

_BLOCK = 128


def times_inverse(matrix: Tensor, layout: Tensor, lower: Tensor, pivots: Tensor) -> Tensor:
    """matrix (B, out, in) float32 in storage order times H^-1, H = R D R^T in layout order; the rest as in
    `quantkit.quantizers.ldlq.Factor`."""
    in_features = matrix.shape[-1]
    rows = placed(matrix, layout)[0]  # (B, in, out): R D R^T Y^T = rows
    with tensor_float32():
        inverses = _inverses(lower)
        _forward(rows, lower, inverses, 0, in_features)
        rows /= pivots.unsqueeze(-1)
        _backward(rows, lower, inverses, 0, in_features)
    rank = layout.argsort(-1) + in_features * torch.arange(len(layout), device=layout.device)[:, None]
    return transposed(rows.flatten(0, 1).index_select(0, rank.flatten()).view(rows.shape))


def _inverses(lower: Tensor) -> list[Tensor]:
    """Inverse of each unit lower triangular block on the diagonal, (B, 128, 128); the last may be smaller."""
    n_matrices, n, _ = lower.shape
    whole = n // _BLOCK
    strides = lower.stride(0), _BLOCK * (n + 1), n, 1
    blocks = lower.as_strided((n_matrices, whole, _BLOCK, _BLOCK), strides, lower.storage_offset())
    found = list(_inverse(blocks).unbind(1)) if whole else []
    rest = lower[:, whole * _BLOCK :, whole * _BLOCK :]
    return [*found, _inverse(rest)] if rest.shape[-1] else found


def _inverse(blocks: Tensor) -> Tensor:
    one = torch.eye(blocks.shape[-1], device=blocks.device).expand(blocks.shape)
    return torch.linalg.solve_triangular(blocks.tril(-1), one, upper=False, unitriangular=True)


def _middle(start: int, stop: int) -> int:
    return start + -(-(stop - start) // _BLOCK) // 2 * _BLOCK


def _forward(rows: Tensor, lower: Tensor, inverses: list[Tensor], start: int, stop: int) -> None:
    """Solve R Z = rows for the rows [start, stop), in place."""
    if stop - start <= _BLOCK:
        rows[:, start:stop] = inverses[start // _BLOCK] @ rows[:, start:stop]
        return
    middle = _middle(start, stop)
    _forward(rows, lower, inverses, start, middle)
    rows[:, middle:stop].baddbmm_(lower[:, middle:stop, start:middle], rows[:, start:middle], alpha=-1)
    _forward(rows, lower, inverses, middle, stop)


def _backward(rows: Tensor, lower: Tensor, inverses: list[Tensor], start: int, stop: int) -> None:
    """Solve R^T Z = rows for the rows [start, stop), in place."""
    if stop - start <= _BLOCK:
        rows[:, start:stop] = inverses[start // _BLOCK].mT @ rows[:, start:stop]
        return
    middle = _middle(start, stop)
    _backward(rows, lower, inverses, middle, stop)
    rows[:, start:middle].baddbmm_(lower[:, middle:stop, start:middle].mT, rows[:, middle:stop], alpha=-1)
    _backward(rows, lower, inverses, start, middle)
