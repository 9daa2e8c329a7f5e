"""LDLQ for codebooks: error feedback where several neighbours are coded at once (block LDLQ, QuIP#, arXiv 2402.04396,
section 4.1).

With H = R D R^T in storage order and R_k the unit triangle of vector k's own columns, the loss of vector k is
(e_k + f_k) R_k D_k R_k^T (e_k + f_k)^T, where f_k = (sum_{j before k} e_j R[j, k]) R_k^-1 comes from the vectors coded
before. So vector k is coded near w_k + f_k, each weight as important as the diagonal of R_k D_k R_k^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.quantizers.ldlq.sweep import Factor
from quantkit.schemes.grid import VectorGrid


@dataclass(frozen=True, slots=True)
class _Work:
    """All (B, in, out), rows in the factor's layout: storage order from the last row to the first. ``error``: the
    target until a row is coded, then what is left of it; ``pending``: the sum in f_k."""

    grid: VectorGrid
    factor: Factor
    error: Tensor
    pending: Tensor


def sweep_vectors(grid: VectorGrid, target: Tensor, factor: Factor) -> Tensor:
    """Code all columns of ``target`` (B, out, in) float32; ``factor`` must be in storage order (act_order=False).

    Returns target - coded, (B, out, in).
    """
    error = target.mT.flip(1).contiguous()
    work = _Work(grid, factor, error, torch.zeros_like(error))
    _span(work, 0, target.shape[-1])
    return work.error.flip(1).mT


def _span(work: _Work, start: int, stop: int) -> None:
    """Code rows [start, stop), the last first; the two halves are whole vectors."""
    width = work.grid.width
    if stop - start == width:
        _vector(work, start, stop)
        return
    middle = start + (stop - start) // width // 2 * width
    _span(work, middle, stop)
    work.pending[:, start:middle].baddbmm_(
        work.factor.lower[:, middle:stop, start:middle].mT, work.error[:, middle:stop]
    )
    _span(work, start, middle)


def _vector(work: _Work, start: int, stop: int) -> None:
    own = work.factor.lower[:, start:stop, start:stop]
    feedback = torch.linalg.solve_triangular(own.mT, work.pending[:, start:stop], upper=True, unitriangular=True)
    triangle = own.tril(-1) + torch.eye(stop - start, device=own.device)
    importance = (triangle.square() * work.factor.pivots[:, None, start:stop]).sum(-1)
    first = work.error.shape[1] - stop  # in storage
    wanted = (work.error[:, start:stop] + feedback).flip(1).mT.contiguous()
    coded = work.grid.encode(wanted, first, importance.flip(-1))
    work.error[:, start:stop] -= coded.mT.flip(1)
