"""What a scheme loses on Gaussian weights: the measure that a linear is held against after it was quantised.

Trained weights are near to it: a linear that loses several times as much does not fit its scheme. Its scales may be too
small for their dtype, or a few of its weights far larger than the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from quantkit.schemes import ChosenScheme

if TYPE_CHECKING:
    import torch

POOR_FIT = 5.0
"""A linear fits its scheme poorly if it loses more than this many times what Gaussian weights lose."""
_ALL_LOST = 0.9
"""The limit for schemes that lose more than a sixth of Gaussian weights: a linear stored as zeros has the loss 1."""
_ROWS, _COLUMNS = 16, 2048


def gaussian_losses(device: torch.device) -> Callable[[ChosenScheme], float]:
    """`gaussian_loss` on this device, each scheme measured once."""

    @cache
    def measured(scheme: ChosenScheme) -> float:
        return gaussian_loss(scheme, device)

    return measured


def gaussian_loss(scheme: ChosenScheme, device: torch.device) -> float:
    """Relative squared error of 32,768 Gaussian weights, always the same ones, rounded to nearest with searched
    scales. ``device``: computes it, so that no kernel is compiled for this alone."""
    import torch

    weight = torch.randn(1, _ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0)).to(device)
    decoded = scheme.decode(**scheme.rounded(weight, None, points=40, signed=True))
    return float((decoded - weight).square().sum() / weight.square().sum())


def fits_poorly(relative_loss: float, on_gaussian: float) -> bool:
    """Whether a linear's loss is far above that of Gaussian weights in the same scheme."""
    return relative_loss > min(POOR_FIT * on_gaussian, _ALL_LOST)
