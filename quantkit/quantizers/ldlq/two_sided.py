"""LDLQ over rows and columns: errors are also weighed by what they do to the model's loss (YAQA, arXiv 2505.22988).

With the output Hessian H_O = sum g g^T over tokens, g the gradient of the loss at a linear's outputs, the loss of an
error E is tr(H_O E H E^T) in place of tr(E H E^T). H_O = R D R^T (R unit lower triangular) moves what rows have left
over to rows that are still open, as H does for columns. Rows are laid out by rising diag(H_O), taken from the last to
the first, and row i aims at

    t_i = w_i + sum_{j>i} R[j, i] (w_j - q_j)

With a row at a time that is exactly LDLQ in both directions. Here some rows are rounded at once, so that a sweep has
work; they do not hear of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.kernels.backend import Backend, backend_of, narrow_product, tensor_float32
from quantkit.quantizers.batch import rows_at_once

if TYPE_CHECKING:
    from quantkit.schemes.grid import Stored

DAMPING = 0.1
"""Share of the mean diagonal that is added to the diagonal of an output Hessian."""


@dataclass(frozen=True, slots=True)
class OutputFactor:
    """Damped output Hessians of B matrices, or one for all of them (B = 1), and their factors. A matrix has n diagonal
    blocks of r rows (one, or one a head); between blocks nothing is known. hessian (B, n, r, r) float32, mean diagonal
    of each matrix 1; layout (B, n, r) int64: the row at each place of a block, the last is rounded first; lower
    (B, n, r, r): R in that order, unit lower triangular."""

    hessian: Tensor
    layout: Tensor
    lower: Tensor


def factorize_output(hessian: Tensor) -> OutputFactor:
    """hessian (B, n, r, r) float32 of any scale, overwritten -> damped, scaled and factored. A block of zeros becomes
    the identity times a small number: its rows do not hear of each other.

    Raises `CalibrationError` if it is not finite.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    tiny = torch.finfo(torch.float32).tiny
    hessian /= diagonal.mean((-2, -1)).clamp_min(tiny)[:, None, None, None]
    diagonal += (DAMPING * diagonal.mean(-1, keepdim=True)).clamp_min(1e-6)
    layout = diagonal.argsort(dim=-1, stable=True)
    lower, failed = torch.linalg.cholesky_ex(_in_order(_in_order(hessian, layout).mT, layout))
    if failed.any() or not lower.diagonal(dim1=-2, dim2=-1).isfinite().all():
        raise CalibrationError(
            "the gradients at the outputs of these linears overflow or are not numbers.",
            hint="Measure the sensitivity anew, or take output_aware: false for them.",
        )
    return OutputFactor(hessian, layout, lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2))


def round_rows(
    target: Tensor, factor: OutputFactor, quantize: Callable[[Tensor], Stored], decode: Callable[[Stored], Tensor]
) -> tuple[Stored, Tensor]:
    """Quantise ``target`` (B, out, in) float32 with feedback between rows -> what is stored, and target - decoded.

    ``quantize`` is given some rows (B, rows, in) where they should end up; ``decode`` undoes what it returns.
    """
    _, n_blocks, height, _ = factor.lower.shape
    wanted = _in_order(target.unflatten(1, (n_blocks, height)), factor.layout)
    error, step = torch.empty_like(wanted), rows_at_once(height)
    parts: list[Stored] = []
    for stop in range(height, 0, -step):
        own = slice(max(0, stop - step), stop)
        moved = wanted[:, :, own]
        if stop < height:
            with tensor_float32():
                moved = moved + factor.lower[:, :, stop:, own].mT @ error[:, :, stop:]
        stored = quantize(moved.flatten(1, 2).contiguous())
        error[:, :, own] = wanted[:, :, own] - decode(stored).unflatten(1, (n_blocks, -1))
        parts.append({key: values.unflatten(1, (n_blocks, -1)) for key, values in stored.items()})
    back = factor.layout.argsort(-1)
    joined = {key: torch.cat([part[key] for part in reversed(parts)], 2) for key in parts[0]}
    stored = {key: _in_order(values, back).flatten(1, 2) for key, values in joined.items()}
    return stored, _in_order(error, back).flatten(1, 2)


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    """values (B, n, r, ...) of any dtype, with the rows of each block in ``order`` (B or 1, n, r)."""
    matrices, blocks = (torch.arange(count, device=order.device) for count in values.shape[:2])
    return values[matrices[:, None, None], blocks[:, None], order]


def losses(error: Tensor, hessian: Tensor, output_hessian: Tensor) -> tuple[Tensor, Tensor]:
    """By row (B, out) the parts of tr(E H E^T) and of tr(H_O E H E^T): error (B, out, in), hessian (B, in, in),
    output_hessian (B, n, r, r)."""
    blocks = error.unflatten(1, output_hessian.shape[1:3])
    if backend_of(error) is Backend.TRITON:
        through = narrow_product(error, hessian)
        left = output_hessian.expand(len(error), *output_hessian.shape[1:]).flatten(0, 1)
        across = narrow_product(left, blocks.flatten(0, 1)).view_as(error)
    else:
        through, across = error @ hessian, (output_hessian @ blocks).flatten(1, 2)
    return (error * through).sum(-1), across.mul_(through).sum(-1)
