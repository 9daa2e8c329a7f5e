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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.kernels.backend import tensor_float32
from quantkit.quantizers.ldlq.factor import row_loss
from quantkit.quantizers.ldlq.rows import rows_at_once

if TYPE_CHECKING:
    from quantkit.schemes.grid import Stored

DAMPING = 0.1
"""Share of the mean diagonal that is added to the diagonal of an output Hessian."""


@dataclass(frozen=True, slots=True)
class OutputFactor:
    """H_O = R D R^T, damped, of B matrices, or one for all of them (B = 1). A matrix has n diagonal blocks of r rows
    (one, or one a head); between blocks nothing is known.

    diagonal (B, n, r): of H_O, its mean 1 but for the damping; layout (B, n, r) int64: the row at each place of a
    block, the last is rounded first; in that order lower (B, n, r, r): R, unit lower triangular, pivots (B, n, r): D.
    """

    diagonal: Tensor
    layout: Tensor
    lower: Tensor
    pivots: Tensor


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """What is stored of all rows; error (B, out, in) = E, target - decoded; ``felt`` likewise: R^T E, what each row's
    error and those of all rows that were rounded before it leave over."""

    stored: Stored
    error: Tensor
    felt: Tensor


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
    root = lower.diagonal(dim1=-2, dim2=-1).clone()
    return OutputFactor(diagonal.clone(), layout, lower.div_(root.unsqueeze(-2)), root.square_())


def one_under_the_other(factors: Sequence[OutputFactor]) -> OutputFactor:
    """Of linears with blocks of one size, whose rows follow one another."""
    parts = zip(*((one.diagonal, one.layout, one.lower, one.pivots) for one in factors), strict=True)
    return OutputFactor(*(torch.cat(values, 1) for values in parts))


def round_rows(
    target: Tensor, factor: OutputFactor, quantize: Callable[[Tensor], Stored], decode: Callable[[Stored], Tensor]
) -> RoundedRows:
    """Quantise ``target`` (B, out, in) float32 with feedback between rows.

    ``quantize`` is given some rows (B, rows, in) where they should end up; ``decode`` undoes what it returns.
    """
    _, n_blocks, height, _ = factor.lower.shape
    wanted = _in_order(target.unflatten(1, (n_blocks, height)), factor.layout)
    error, felt, step = torch.empty_like(wanted), torch.empty_like(wanted), rows_at_once(height)
    parts: list[Stored] = []
    for stop in range(height, 0, -step):
        own = slice(max(0, stop - step), stop)
        moved = wanted[:, :, own]
        if stop < height:
            with tensor_float32():
                moved = moved + factor.lower[:, :, stop:, own].mT @ error[:, :, stop:]
        stored = quantize(moved.flatten(1, 2).contiguous())
        decoded = decode(stored).unflatten(1, (n_blocks, -1))
        error[:, :, own] = wanted[:, :, own] - decoded
        with tensor_float32():
            unheard = factor.lower[:, :, own, own].tril(-1).mT @ error[:, :, own]
        felt[:, :, own] = moved - decoded + unheard
        parts.append({key: values.unflatten(1, (n_blocks, -1)) for key, values in stored.items()})
    back = factor.layout.argsort(-1)
    joined = {key: torch.cat([part[key] for part in reversed(parts)], 2) for key in parts[0]}
    stored = {key: _in_order(values, back).flatten(1, 2) for key, values in joined.items()}
    return RoundedRows(stored, *(_in_order(values, back).flatten(1, 2) for values in (error, felt)))


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    """values (B, n, r, ...) of any dtype, with the rows of each block in ``order`` (B or 1, n, r)."""
    matrices, blocks = (torch.arange(count, device=order.device) for count in values.shape[:2])
    return values[matrices[:, None, None], blocks[:, None], order]


def output_losses(rounded: RoundedRows, factor: OutputFactor, hessian: Tensor) -> Tensor:
    """(B, out): parts of tr(H_O E H E^T) = tr(D F H F^T), F = R^T E, by row. hessian (B, in, in)."""
    pivots = _in_order(factor.pivots, factor.layout.argsort(-1))
    return row_loss(rounded.felt, hessian) * pivots.flatten(1, 2)
