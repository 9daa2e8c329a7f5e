"""Gains of output rows, folded into the scales that a format stores anyway.

What a linear adds to the residual stream is compared with what the original adds: with x its input in the calibrated
stream and y the same token's in the unquantised one, row r of the decoded weight q and of the original w, the gain

    g_r = E[(q_r x)(w_r y)] / E[(q_r x)^2]

is least squares of the row's output. Coordinate descent has moved scales under a target that follows y half-way
(`cross`); this is the rest of the way, along the one direction that all groups of a row share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes import ChosenScheme
    from quantkit.schemes.grid import Stored

LEAST, MOST = 0.5, 2.0
"""What lies outside is no correction of rounding: such rows stay."""


@runtime_checkable
class RowScaled(Protocol):
    """A scheme whose stored scales can take a gain of a row."""

    @property
    def takes_row_gains(self) -> bool:
        """Whether this one can: its scales are floats of each row, fine enough."""
        ...

    def with_row_gains(self, stored: Stored, gains: Tensor) -> Stored:
        """What is stored, scales times gains (B, out) float32, rounded to what the scheme stores."""
        ...


def takes_row_gains(scheme: ChosenScheme) -> bool:
    """Whether a scheme's stored scales can take a gain of a row."""
    return isinstance(scheme, RowScaled) and scheme.takes_row_gains


def gained(scheme: ChosenScheme, stored: Stored, gains: Tensor) -> Stored:
    """What is stored with gains (B, out) float32 in its scales; as it is where these take none."""
    if not isinstance(scheme, RowScaled) or not scheme.takes_row_gains:
        return stored
    return scheme.with_row_gains(stored, gains)


def row_gains(weight: Tensor, decoded: Tensor, hessian: Tensor, cross: Tensor | None) -> Tensor:
    """(B, out) float32: g of each row, 1 where it would be out of range. weight, decoded (B, out, in) float32; hessian
    (B, in, in) = E[x x^T]; cross (B, in, in) = E[(y - x) x^T], None: the original reads x too."""
    import torch

    from quantkit.quantizers.ldlq.factor import row_loss

    wanted = ((decoded @ hessian) * weight).sum(-1)
    if cross is not None:
        wanted += ((weight @ cross) * decoded).sum(-1)
    found = wanted / row_loss(decoded, hessian)
    return torch.where((found >= LEAST) & (found <= MOST), found, torch.ones_like(found))
