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
        levels=_Levels(grid),
        codes=torch.empty(target.mT.shape, dtype=torch.uint8, device=target.device),
        loss=loss,
    )
    _sweep_span(columns, factor, 0, in_features)
    return _columns(columns.codes.mT, factor.layout.argsort(-1))


class _Levels:
    """The nearest code of a value in units of its scale, and the level of a code."""

    def __init__(self, grid: Grid) -> None:
        self.top = grid.top
        table = grid.table
        self._table = table
        self._middles = None if table is None else (table[1:] + table[:-1]) / 2

    def round(self, values: Tensor, zero: Tensor | float) -> tuple[Tensor, Tensor]:
        """values (overwritten), zero: of integer levels -> codes, levels, both float32 and shaped like values."""
        if self._table is None or self._middles is None:
            codes = values.add_(zero).round_().clamp_(0, self.top)
            return codes, codes - zero
        codes = torch.bucketize(values, self._middles)
        return codes, self._table[codes]

    def of(self, codes: Tensor, zero: Tensor | float) -> Tensor:
        """codes uint8 -> levels float32."""
        return codes.float() - zero if self._table is None else self._table[codes.int()]


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
    levels: _Levels
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
    codes, levels = columns.levels.round(wanted / _divisor(scale), zero)
    columns.codes[:, column] = codes
    error.addcmul_(levels, scale, value=-1)
    if columns.loss is not None:
        off = torch.addcmul(wanted, levels, scale, value=-1)
        columns.loss.addcmul_(off.square_(), factor.pivots[:, column, None])
    if column > start:
        weights = factor.lower[:, column, start:column, None]
        columns.moved[:, start:column].addcmul_(weights, error.unsqueeze(1))


def _divisor(scale: Tensor) -> Tensor:
    """What brings values to units of a scale; a group without extent has scale 0, and any code will do."""
    return scale.masked_fill(scale == 0, torch.inf)


@dataclass(frozen=True, slots=True)
class Polished:
    """codes (B, out, in) uint8, scale and offset (B, out, groups) float32, loss tr(E H E^T) (B, out) float32."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    loss: Tensor


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
    work = _Descent.of(grid, target, codes, hessian)
    for _ in range(rounds):
        for group in range(work.scales.shape[1]):
            _polish_group(work, group)
    offset = None if work.offsets is None else _transposed(work.offsets)
    final = _transposed(work.codes.to(codes.dtype))
    return Polished(final, _transposed(work.scales), offset, (work.error * work.gradient).sum(1))


def _transposed(tensor: Tensor) -> Tensor:
    """(B, m, n) -> (B, n, m), always a copy, and with the usual strides even where m or n is 1."""
    return tensor.mT.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class _Descent:
    """A polish under way, transposed: codes, levels, error, gradient (B, in, out), scales, offsets (B, groups, out)
    float32."""

    grid: Grid
    find: _Levels
    hessian: Tensor
    codes: Tensor
    levels: Tensor
    error: Tensor
    gradient: Tensor
    scales: Tensor
    offsets: Tensor | None
    zero: Tensor | float

    @classmethod
    def of(cls, grid: Grid, target: Tensor, codes: Tensor, hessian: Tensor) -> _Descent:
        size = target.shape[-1] // grid.scale.shape[-1]
        zero = grid.zero.repeat_interleave(size, -1).mT if isinstance(grid.zero, Tensor) else grid.zero
        find = _Levels(grid)
        levels = find.of(codes.mT, zero).contiguous()
        # Copies even where the layout is this one already: they move, the grid stays.
        scales = _transposed(grid.scale)
        offsets = None if grid.offset is None else _transposed(grid.offset)
        error = target.mT - levels * scales.repeat_interleave(size, 1)
        if offsets is not None:
            error -= offsets.repeat_interleave(size, 1)
        return cls(grid, find, hessian, codes.mT.float(), levels, error, hessian @ error, scales, offsets, zero)


def _polish_group(work: _Descent, group: int) -> None:
    size = work.levels.shape[1] // work.scales.shape[1]
    span = slice(group * size, (group + 1) * size)
    local = work.gradient[:, span].clone()
    change = -work.error[:, span]
    _step_scale(work, group, span, local)
    if work.offsets is not None:
        _step_offset(work, work.offsets, group, span, local)
    _step_codes(work, group, span, local)
    change += work.error[:, span]
    work.gradient.baddbmm_(work.hessian[:, :, span], change)


def _step_scale(work: _Descent, group: int, span: slice, gradient: Tensor) -> None:
    """The better scale of one group; ``error`` and ``gradient`` (B, group, out) follow in place."""
    levels, scale = work.levels[:, span], work.scales[:, group]
    through = work.hessian[:, span, span] @ levels
    curvature, slope = (levels * through).sum(1), (levels * gradient).sum(1)
    wanted = scale + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    step = _if_better(work.grid.nearest_scale(group, wanted) - scale, curvature, slope)
    work.error[:, span].addcmul_(levels, step.unsqueeze(1), value=-1)
    gradient.addcmul_(through, step.unsqueeze(1), value=-1)
    work.scales[:, group] = scale + step


def _step_offset(work: _Descent, offsets: Tensor, group: int, span: slice, gradient: Tensor) -> None:
    """The better offset of one group, in the same way."""
    through = work.hessian[:, span, span].sum(-1, keepdim=True)  # (B, group, 1)
    curvature, slope = through.sum(1).expand(offsets[:, group].shape), gradient.sum(1)
    wanted = offsets[:, group] + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    step = _if_better(work.grid.nearest_offset(group, wanted) - offsets[:, group], curvature, slope)
    work.error[:, span] -= step.unsqueeze(1)
    gradient.addcmul_(through, step.unsqueeze(1), value=-1)
    offsets[:, group] += step


def _if_better(step: Tensor, curvature: Tensor, slope: Tensor) -> Tensor:
    """The step where it lowers the loss, else 0."""
    return torch.where((step * (step * curvature - 2 * slope) < 0) & (curvature > 0), step, 0.0)


def _step_codes(work: _Descent, group: int, span: slice, gradient: Tensor) -> None:
    """Move each code of one group to its best level given all others; ``gradient`` (B, group, out) follows in place."""
    hessian, scale = work.hessian[:, span, span], work.scales[:, group]
    levels, codes, error = work.levels[:, span], work.codes[:, span], work.error[:, span]
    zero = work.zero[:, span] if isinstance(work.zero, Tensor) else work.zero
    inverse = 1 / _divisor(scale)
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    size = levels.shape[1]
    for start in range(0, size, _LEAF):
        stop = min(start + _LEAF, size)
        before = error[:, start:stop].clone()
        for column in range(start, stop):
            old = levels[:, column]
            wanted = (gradient[:, column] / diagonal[:, column, None]).mul_(inverse).add_(old)
            new_codes, new = work.find.round(wanted, zero[:, column] if isinstance(zero, Tensor) else zero)
            moved = (new - old).mul_(scale)
            levels[:, column] = new
            codes[:, column] = new_codes
            error[:, column] -= moved
            if column + 1 < stop:
                weights = hessian[:, column, column + 1 : stop, None]
                gradient[:, column + 1 : stop].addcmul_(weights, moved.unsqueeze(1), value=-1)
        if stop < size:
            gradient[:, stop:].baddbmm_(hessian[:, stop:, start:stop], error[:, start:stop] - before)


def row_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) by row: error (B, out, in), hessian (B, in, in) -> (B, out) float32."""
    if has_kernels(error):
        from quantkit.kernels import row_loss_triton

        return row_loss_triton.row_loss(error, hessian)
    return ((error @ hessian) * error).sum(-1)
