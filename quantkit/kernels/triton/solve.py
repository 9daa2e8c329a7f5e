# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Products with the inverse of a factored Hessian on a GPU: triangular solves by halving, all of it matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.backend import tensor_float32
from quantkit.kernels.triton.transpose import add_placed, placed

_BLOCK = 128  # the smallest that is inverted alone
_PANEL = 512  # solved with one product


def add_times_inverse(
    weight: Tensor, matrix: Tensor, layout: Tensor, lower: Tensor, pivots: Tensor, factor: float
) -> Tensor:
    """weight + factor * matrix H^-1, H = R D R^T in layout order.

    weight, matrix (B, out, in) float32 in storage order; the rest as in `quantkit.quantizers.ldlq.sweep.Factor`.
    """
    in_features = matrix.shape[-1]
    rows = placed(matrix, layout)  # (B, in, out): R D R^T Y^T = rows
    solved = torch.empty_like(rows)
    with tensor_float32():
        inverses = _inverses(lower)
        _forward(rows, solved, lower, inverses, 0, in_features)
        solved /= pivots.unsqueeze(-1)
        _backward(solved, rows, lower, inverses, 0, in_features)
    return add_placed(rows, layout, weight, factor)


def _inverses(lower: Tensor) -> list[Tensor]:
    """Inverse of each unit lower triangular block of _PANEL on the diagonal, (B, 512, 512); the last may be smaller."""
    whole = lower.shape[-1] // _PANEL
    size = _BLOCK
    found = _inverse(_diagonal_blocks(lower, whole * _PANEL // _BLOCK, size))
    while size < _PANEL:
        found = _doubled(found, _diagonal_blocks(lower, found.shape[1] // 2, 2 * size)[..., size:, :size])
        size *= 2
    rest = lower[:, whole * _PANEL :, whole * _PANEL :]
    return [*found.unbind(1), *([_inverse(rest)] if rest.shape[-1] else [])]


def _diagonal_blocks(lower: Tensor, count: int, size: int) -> Tensor:
    """The first blocks on the diagonal, (B, count, size, size), a view."""
    n_matrices, n, _ = lower.shape
    return lower.as_strided(
        (n_matrices, count, size, size), (lower.stride(0), size * (n + 1), n, 1), lower.storage_offset()
    )


def _inverse(blocks: Tensor) -> Tensor:
    one = torch.eye(blocks.shape[-1], device=blocks.device).expand(blocks.shape)
    return torch.linalg.solve_triangular(blocks.tril(-1), one, upper=False, unitriangular=True)


def _doubled(inverses: Tensor, below: Tensor) -> Tensor:
    """Inverses (B, 2 k, s, s) of blocks, and what lies below each first of a pair (B, k, s, s) -> (B, k, 2 s, 2 s)."""
    first, second = inverses[:, ::2], inverses[:, 1::2]
    corner = -(second @ (below @ first))
    return torch.cat([torch.cat([first, torch.zeros_like(first)], -1), torch.cat([corner, second], -1)], -2)


def _middle(start: int, stop: int) -> int:
    return start + -(-(stop - start) // _PANEL) // 2 * _PANEL


def _forward(rows: Tensor, solved: Tensor, lower: Tensor, inverses: list[Tensor], start: int, stop: int) -> None:
    """Solve R Z = rows for the rows [start, stop). Overwrites them; Z goes to ``solved``."""
    if stop - start <= _PANEL:
        torch.bmm(inverses[start // _PANEL], rows[:, start:stop], out=solved[:, start:stop])
        return
    middle = _middle(start, stop)
    _forward(rows, solved, lower, inverses, start, middle)
    rows[:, middle:stop].baddbmm_(lower[:, middle:stop, start:middle], solved[:, start:middle], alpha=-1)
    _forward(rows, solved, lower, inverses, middle, stop)


def _backward(rows: Tensor, solved: Tensor, lower: Tensor, inverses: list[Tensor], start: int, stop: int) -> None:
    """Solve R^T Z = rows for the rows [start, stop). Overwrites them; Z goes to ``solved``."""
    if stop - start <= _PANEL:
        torch.bmm(inverses[start // _PANEL].mT, rows[:, start:stop], out=solved[:, start:stop])
        return
    middle = _middle(start, stop)
    _backward(rows, solved, lower, inverses, middle, stop)
    rows[:, start:middle].baddbmm_(lower[:, middle:stop, start:middle].mT, solved[:, middle:stop], alpha=-1)
    _backward(rows, solved, lower, inverses, start, middle)
