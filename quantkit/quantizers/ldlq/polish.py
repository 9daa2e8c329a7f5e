"""Coordinate descent on the codes and scales that the sweep has chosen, and its twin in plain torch, with which the
kernels are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, backend_of
from quantkit.quantizers.ldlq.levels import Levels, divisor, fits_gpu_kernels
from quantkit.schemes.grid import Grid

_AT_ONCE = 16  # codes moved one at a time; the rest of their group follows through a matrix product


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
    backend = backend_of(target)
    if backend is Backend.TRITON and fits_gpu_kernels(grid):
        from quantkit.kernels.triton import polish as polish_triton

        return Polished(*polish_triton.polish(grid, target, codes, hessian, rounds))
    if backend is Backend.NUMBA:
        from quantkit.kernels.numba import polish as polish_numba

        return Polished(*polish_numba.polish(grid, target, codes, hessian, rounds))
    return polish_in_torch(grid, target, codes, hessian, rounds)


def polish_in_torch(grid: Grid, target: Tensor, codes: Tensor, hessian: Tensor, rounds: int) -> Polished:
    """`polish` in plain torch."""
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
    find: Levels
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
        find = Levels(grid)
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
    inverse = 1 / divisor(scale)
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    size = levels.shape[1]
    for start in range(0, size, _AT_ONCE):
        stop = min(start + _AT_ONCE, size)
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
