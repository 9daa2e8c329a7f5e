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

from quantkit.errors import CalibrationError
from quantkit.kernels.compiled import has_compiled
from quantkit.kernels.cuda import has_kernels, narrow_product
from quantkit.quantizers.ldlq_polish import Polished, polish_in_torch
from quantkit.quantizers.levels import Levels, divisor
from quantkit.schemes.grid import Grid

_LEAF = 16  # columns rounded one at a time; wider spans go through matrix products
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
    if has_kernels(hessian):
        from quantkit.kernels import cholesky_triton

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
    if has_kernels(weight):
        from quantkit.kernels import solve_triton

        moved = narrow_product(weight, cross)
        return solve_triton.add_times_inverse(weight, moved, factor.layout, factor.lower, factor.pivots, alpha)
    moved = _columns(weight @ cross, factor.layout)
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
    return _columns(moved, factor.layout.argsort(-1)).mul_(alpha).add_(weight)


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """(B, out, in) with its columns in ``order`` (B, in)."""
    return matrix.gather(-1, order.unsqueeze(-2).expand(matrix.shape))


def sweep(grid: Grid, target: Tensor, factor: Factor, loss: Tensor | None = None) -> Tensor:
    """Round the columns of ``target`` with error feedback on a fixed grid (groups stay where storage has them: static
    groups).

    target (B, out, in) float32 -> codes (B, out, in) uint8 in storage order. ``loss`` (B, out) float32: tr(E H E^T) of
    each row is added to it.
    """
    if has_kernels(target):
        from quantkit.kernels import sweep_triton

        return sweep_triton.sweep(grid, target, factor.layout, factor.lower, factor.pivots, loss)
    if has_compiled(target):
        from quantkit.kernels import sweep_leaf

        return sweep_leaf.sweep(grid, target, factor.layout, factor.lower, factor.pivots, loss)
    in_features = target.shape[-1]
    group = factor.layout.div(in_features // grid.scale.shape[-1], rounding_mode="floor")  # of each place
    columns = _Columns(
        error=_columns(target, factor.layout).mT.contiguous(),
        moved=_columns(target, factor.layout).mT.contiguous(),
        scale=_columns_of_groups(grid.scale, group),
        zero=_columns_of_groups(grid.zero, group) if isinstance(grid.zero, Tensor) else grid.zero,
        offset=None if grid.offset is None else _columns_of_groups(grid.offset, group),
        levels=Levels(grid),
        codes=torch.empty(target.mT.shape, dtype=torch.uint8, device=target.device),
        loss=loss,
    )
    _sweep_span(columns, factor, 0, in_features)
    return _columns(columns.codes.mT, factor.layout.argsort(-1))


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
    if stop - start <= _LEAF:
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
    """Round one column and push its error to the rest of its leaf, [start, column)."""
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


def polish(grid: Grid, target: Tensor, codes: Tensor, hessian: Tensor, rounds: int) -> Polished:
    """Coordinate descent on tr(E H E^T), group by group: the group's scale, its offset if it has one, then each of its
    codes, all others fixed.

    With the gradient G = E H kept up to date, the best step along a direction q of a group is (q . G_g) / (q H_gg q):
    q is the levels for the scale, ones for the offset, one column for a code. Only steps that lower the loss are taken,
    so a round never raises it.

    target (B, out, in) float32, codes uint8 the same, hessian (B, in, in) damped.
    """
    if has_kernels(target):
        from quantkit.kernels import polish_triton

        return Polished(*polish_triton.polish(grid, target, codes, hessian, rounds))
    if has_compiled(target):
        from quantkit.kernels import polish_leaf

        return Polished(*polish_leaf.polish(grid, target, codes, hessian, rounds))
    return polish_in_torch(grid, target, codes, hessian, rounds)


def row_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) by row: error (B, out, in), hessian (B, in, in) -> (B, out) float32."""
    if has_kernels(error):
        from quantkit.kernels import row_loss_triton

        return row_loss_triton.row_loss(error, hessian)
    return ((error @ hessian) * error).sum(-1)
