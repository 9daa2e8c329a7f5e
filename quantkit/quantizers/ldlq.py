"""GPTQ's error feedback written as LDLQ (QuIP, arXiv 2307.13304, section 3; GPTQ, arXiv 2210.17323, algorithm 1: same
codes).

Columns are laid out by *rising* diag(H) and rounded from the last to the first. With the damped Hessian in that layout,
H = R D R^T (R unit lower triangular, from ONE Cholesky, no inverse), column k is rounded as

    w'_k = w_k + sum_{j>k} (w_j - q_j) R[j, k]          q_k = nearest level to w'_k

and the loss tr(E H E^T) is sum_k D_k (w'_k - q_k)^2. (The index-reversed form of U D U^T, so that nothing is flipped.)

Everything is batched over matrices of one shape: B experts at once. Float32 throughout; the caller sets the TF32 mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.schemes import IntScheme
from quantkit.schemes.affine_int import representable

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


def factorize(hessian: Tensor, damp_percent: float, *, act_order: bool) -> Factor:
    """Damp, order and factor a batch of Hessians (B, in, in) float32. The argument is overwritten with its damped form.

    An input that never fires has a zero row: damping keeps it invertible, and its rounding error reaches no other
    column.
    If float32 rounding still makes a pivot negative the damping is raised tenfold for the whole batch, and
    `Factor.damping` says so. Two matrices of this size exist at the end, and never more than that and a panel.
    """
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    step = damp_percent * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    raised, added = 1.0, 0.0
    while True:
        diagonal += (raised - added) * step
        added = raised
        layout = diagonal.argsort(dim=-1, stable=True) if act_order else _storage_order(diagonal).flip(-1)
        lower = _permuted(hessian, layout)
        if _cholesky_(lower) and torch.diagonal(lower, dim1=-2, dim2=-1).isfinite().all():
            break
        if raised > 1e6:
            raise CalibrationError(
                "the inputs of these linears overflow or are not numbers.",
                hint="Check the source's weights, or keep this layer.",
            )
        raised *= 10
    root = torch.diagonal(lower, dim1=-2, dim2=-1).clone()
    lower /= root.unsqueeze(-2)
    return Factor(hessian, layout, lower, root.square_(), raised)


def _storage_order(diagonal: Tensor) -> Tensor:
    return torch.arange(diagonal.shape[-1], device=diagonal.device).expand(diagonal.shape)


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


def sweep(scheme: IntScheme, target: Tensor, scale: Tensor, zero_point: Tensor | None, factor: Factor) -> Tensor:
    """Round the columns of ``target`` with error feedback on a fixed grid (groups stay where storage has them: static
    groups).

    target (B, out, in) float32; scale (B, out, groups); zero_point the same or None
    -> codes (B, out, in) uint8 in storage order.
    """
    in_features = target.shape[-1]
    group = factor.layout.div(in_features // scale.shape[-1], rounding_mode="floor")  # of each place
    columns = _Columns(
        error=_columns(target, factor.layout).mT.contiguous(),
        moved=_columns(target, factor.layout).mT.contiguous(),
        scale=_columns_of_groups(scale.float(), group),
        zero=None if zero_point is None else _columns_of_groups(zero_point.float(), group),
        half=2.0 ** (scheme.bits - 1),
        top=2**scheme.bits - 1,
        codes=torch.empty(target.mT.shape, dtype=torch.uint8, device=target.device),
    )
    _sweep_span(columns, factor, 0, in_features)
    return _columns(columns.codes.mT, factor.layout.argsort(-1))


@dataclass(frozen=True, slots=True)
class _Columns:
    """A sweep under way, transposed so that one column of the weight is contiguous. All are (B, in, out) in
    layout order.

    ``moved`` holds w', ``error`` the target until a column is rounded and w - q afterwards.
    """

    error: Tensor
    moved: Tensor
    scale: Tensor
    zero: Tensor | None
    half: float
    top: int
    codes: Tensor


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
    zero = columns.half if columns.zero is None else columns.zero[:, column]
    codes = (columns.moved[:, column] / scale).add_(zero).round_().clamp_(0, columns.top)
    columns.codes[:, column] = codes
    error = columns.error[:, column]
    error.addcmul_(codes.sub_(zero), scale, value=-1)
    if column > start:
        weights = factor.lower[:, column, start:column, None]
        columns.moved[:, start:column].addcmul_(weights, error.unsqueeze(1))


def polish(
    scheme: IntScheme,
    target: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    hessian: Tensor,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinate descent on tr(E H E^T), group by group: the group's scale, then each of its codes, all others fixed.

    With the gradient G = E H kept up to date, the best step of a scale is (q . G_g) / (q H_gg q), that of a column
    G_k / H_kk. Only steps that lower the loss are taken, so a round never raises it.

    target (B, out, in) float32, codes uint8 the same, scale and zero_point (B, out, groups)
    -> codes, scale in the scheme's dtype, loss (B, out) float32.
    """
    zero: Tensor | float = 2.0 ** (scheme.bits - 1)
    if zero_point is not None:
        zero = zero_point.float().repeat_interleave(target.shape[-1] // scale.shape[-1], -1).mT
    levels = (codes.mT.float() - zero).contiguous()  # (B, in, out): a column is contiguous
    scales = scale.float().mT.contiguous()
    n_groups, size = scales.shape[1], target.shape[-1] // scales.shape[1]
    error = target.mT - levels * scales.repeat_interleave(size, 1)
    gradient = hessian @ error
    for _ in range(rounds):
        for group in range(n_groups):
            span = slice(group * size, (group + 1) * size)
            own = hessian[:, span, span]
            local = gradient[:, span].clone()
            change = -error[:, span]
            scales[:, group] = _step_scale(scheme, scales[:, group], levels[:, span], error[:, span], local, own)
            low = -zero[:, span] if isinstance(zero, Tensor) else -zero
            _step_codes(scheme, scales[:, group], levels[:, span], error[:, span], local, own, low)
            change += error[:, span]
            gradient.baddbmm_(hessian[:, :, span], change)
    final = (levels + zero).mT.to(codes.dtype)
    return final, scales.mT.to(scale.dtype), (error * gradient).sum(1)


def _step_scale(
    scheme: IntScheme, scale: Tensor, levels: Tensor, error: Tensor, gradient: Tensor, hessian: Tensor
) -> Tensor:
    """The better scale (B, out) of one group; ``error`` and ``gradient`` (B, group, out) follow in place."""
    through = hessian @ levels
    curvature, slope = (levels * through).sum(1), (levels * gradient).sum(1)
    step = representable(scheme, scale + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)) - scale
    step = torch.where((step * (step * curvature - 2 * slope) < 0) & (curvature > 0), step, 0.0)
    error.addcmul_(levels, step.unsqueeze(1), value=-1)
    gradient.addcmul_(through, step.unsqueeze(1), value=-1)
    return scale + step


def _step_codes(
    scheme: IntScheme,
    scale: Tensor,
    levels: Tensor,
    error: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    low: Tensor | float,
) -> None:
    """Move each code of one group to its best level given all others. (B, group, out) tensors follow in place."""
    size, top = levels.shape[1], 2**scheme.bits - 1
    inverse = 1 / scale
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    for start in range(0, size, _LEAF):
        stop = min(start + _LEAF, size)
        before = error[:, start:stop].clone()
        for column in range(start, stop):
            old = levels[:, column]
            wanted = (gradient[:, column] / diagonal[:, column, None]).mul_(inverse).add_(old).round_()
            floor = low[:, column] if isinstance(low, Tensor) else low
            new = wanted.clamp_(floor, floor + top)
            moved = (new - old).mul_(scale)
            levels[:, column] = new
            error[:, column] -= moved
            if column + 1 < stop:
                weights = hessian[:, column, column + 1 : stop, None]
                gradient[:, column + 1 : stop].addcmul_(weights, moved.unsqueeze(1), value=-1)
        if stop < size:
            gradient[:, stop:].baddbmm_(hessian[:, stop:, start:stop], error[:, start:stop] - before)


def row_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) by row: error (B, out, in), hessian (B, in, in) -> (B, out) float32."""
    return ((error @ hessian) * error).sum(-1)
