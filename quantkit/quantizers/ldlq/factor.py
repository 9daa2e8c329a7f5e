"""The factor of a Hessian that the sweep rounds with, and what else is solved with it.

H = R D R^T with R unit lower triangular, of the damped Hessian in the order of rounding: one Cholesky, no inverse.
Batched over matrices of one shape; float32 throughout, on a GPU with Triton by `quantkit.kernels.triton.factor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.kernels.backend import Backend, backend_of, narrow_product

_PANEL = 512  # columns that a Cholesky or triangular solve handles at once


@dataclass(frozen=True, slots=True)
class Factor:
    """H = R D R^T in layout order, for B matrices of one shape.

    hessian (B, in, in) damped, storage order; layout (B, in) int64: storage column of each place, the last is rounded
    first; lower (B, in, in): R below the diagonal (what lies above is undefined); pivots (B, in): D;
    damping: how many times damp_percent had to be taken (1 = as asked).
    """

    hessian: Tensor
    layout: Tensor
    lower: Tensor
    pivots: Tensor
    damping: float


def factorize(hessian: Tensor, damp_percent: float, *, act_order: bool, damped: float = 0.0) -> Factor:
    """Damp, order and factor a batch of Hessians (B, in, in) float32. The argument is overwritten with its damped form.
    ``damped``: how many times it holds damp_percent already.

    An input that never fires has a zero row: damping keeps it invertible, and its rounding error reaches no other
    column.
    If float32 rounding still makes a pivot negative the damping is raised tenfold for the whole batch, and
    `Factor.damping` says so. Two matrices of this size exist at the end, and never more than that and a panel.
    """
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    step = damp_percent * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    raised, added = max(1.0, damped), damped
    while True:
        diagonal += (raised - added) * step
        added = raised
        layout = diagonal.argsort(dim=-1, stable=True) if act_order else _storage_order(diagonal).flip(-1)
        factored = _factored(hessian, layout)
        if factored is not None:
            return Factor(hessian, layout, *factored, raised)
        if raised > 1e6:
            raise CalibrationError(
                "the inputs of these linears overflow or are not numbers.",
                hint="Check the source's weights, or keep this layer.",
            )
        raised *= 10


def in_storage_order(factor: Factor, damp_percent: float) -> Factor:
    """The same damped Hessian factored anew, so that storage column 0 is rounded first. In this order rounding may ask
    for more damping, which `Factor.damping` counts."""
    return factorize(factor.hessian, damp_percent, act_order=False, damped=factor.damping)


def _storage_order(diagonal: Tensor) -> Tensor:
    return torch.arange(diagonal.shape[-1], device=diagonal.device).expand(diagonal.shape)


def _factored(hessian: Tensor, layout: Tensor) -> tuple[Tensor, Tensor] | None:
    """R and D of the Hessians in layout order; None if one is not positive definite."""
    if backend_of(hessian) is Backend.TRITON:
        from quantkit.kernels.triton import factor as cholesky_triton

        return cholesky_triton.factored(hessian, layout)
    lower = _permuted(hessian, layout)
    if not _cholesky_(lower) or not torch.diagonal(lower, dim1=-2, dim2=-1).isfinite().all():
        return None
    root = torch.diagonal(lower, dim1=-2, dim2=-1).clone()
    lower /= root.unsqueeze(-2)
    return lower, root.square_()


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """(B, n, n) with rows and columns in ``order`` (B, n), one copy."""
    result = torch.empty_like(matrix)
    for one, source, columns in zip(result, matrix, order, strict=True):
        for start in range(0, len(columns), _PANEL):
            rows = columns[start : start + _PANEL]
            one[start : start + _PANEL] = source[rows][:, columns]
    return result


def _cholesky_(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of (B, n, n) with its Cholesky factor, left-looking by panels. False: not positive
    definite."""
    n = matrix.shape[-1]
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        panel = matrix[:, start:, start:stop]
        if start:
            panel -= matrix[:, start:, :start] @ matrix[:, start:stop, :start].mT
        block, info = torch.linalg.cholesky_ex(panel[:, : stop - start])
        if info.any():
            return False
        panel[:, : stop - start] = block
        if stop < n:
            below = panel[:, stop - start :]
            below.copy_(torch.linalg.solve_triangular(block.mT, below, upper=True, left=False))
    return True


def towards_original(weight: Tensor, cross: Tensor, factor: Factor, alpha: float) -> Tensor:
    """The target that makes W* x_quantised follow W x_original: W + alpha W C H^-1 (output matching, GPTAQ, arXiv
    2504.02692).

    weight (B, out, in); cross (B, in, in): mean of (x_original - x_quantised) x_quantised^T over the tokens.
    """
    if backend_of(weight) is Backend.TRITON:
        from quantkit.kernels.triton import solve as solve_triton

        moved = narrow_product(weight, cross)
        return solve_triton.add_times_inverse(weight, moved, factor.layout, factor.lower, factor.pivots, alpha)
    moved = columns_in(weight @ cross, factor.layout)
    panels = [slice(start, start + _PANEL) for start in range(0, moved.shape[-1], _PANEL)]
    lower = factor.lower
    for panel in panels:  # X R^T = moved
        moved[..., panel] -= moved[..., : panel.start] @ lower[:, panel, : panel.start].mT
        moved[..., panel] = torch.linalg.solve_triangular(
            lower[:, panel, panel].mT, moved[..., panel], upper=True, left=False, unitriangular=True
        )
    moved /= factor.pivots.unsqueeze(-2)
    for panel in reversed(panels):  # Y R = X
        moved[..., panel] -= moved[..., panel.stop :] @ lower[:, panel.stop :, panel]
        moved[..., panel] = torch.linalg.solve_triangular(
            lower[:, panel, panel], moved[..., panel], upper=False, left=False, unitriangular=True
        )
    return columns_in(moved, factor.layout.argsort(-1)).mul_(alpha).add_(weight)


def columns_in(matrix: Tensor, order: Tensor) -> Tensor:
    """(B, out, in) with its columns in ``order`` (B, in)."""
    return matrix.gather(-1, order.unsqueeze(-2).expand(matrix.shape))


def row_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) by row: error (B, out, in), hessian (B, in, in) -> (B, out) float32."""
    if backend_of(error) is Backend.TRITON:
        from quantkit.kernels.triton import row_loss as row_loss_triton

        return row_loss_triton.row_loss(error, hessian)
    return ((error @ hessian) * error).sum(-1)
