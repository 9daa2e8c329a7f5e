"""Latent codes: numbers whose rounding is the stored index, moved a little at a time against the gradient of a loss
(straight-through estimator).

A latent is a fixed-point number of 24 bits, index * 2**16 + offset: the index uint8 that is stored, and an offset int16
in [-1/2, 1/2) of a step. Here are the two functions that touch every weight of a layer, in plain torch; on a GPU
kernels of the same names do them in one pass (`quantkit.kernels.triton.tuning`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.backend import Backend

ONE = 1 << 16
"""A whole step."""
_HALF = ONE // 2


def nearest_offset(index: Tensor, levels: Tensor, wanted: Tensor, clip: float) -> Tensor:
    """How far ``wanted`` (..., in) float32, in units of the multiplier, lies from levels[index], in steps between
    levels, within +-clip -> offset int16. Between levels it is interpolated."""
    inside = wanted.clamp(float(levels[0]), float(levels[-1]))
    low = (torch.searchsorted(levels, inside.contiguous()) - 1).clamp_(0, len(levels) - 2)
    place = low + (inside - levels[low]) / (levels[low + 1] - levels[low])
    return ((place - index.float()).clamp_(-clip, clip) * ONE).round_().to(torch.int16)


def decode(index: Tensor, levels: Tensor, multiplier: Tensor, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    """index (B, out, in) uint8, levels (n,), multiplier and addend (B, out, groups) float32 -> weight (B, out, in)."""
    if Backend.of(index.device) is Backend.TRITON and dtype != torch.float64:
        from quantkit.kernels.triton import tuning as tuning_triton

        return tuning_triton.decode(index, levels, multiplier, addend, dtype)
    return decode_in_torch(index, levels, multiplier, addend, dtype)


def decode_in_torch(
    index: Tensor, levels: Tensor, multiplier: Tensor, addend: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The twin of the kernel."""
    weight = levels.to(multiplier.dtype)[index.int()].unflatten(-1, (multiplier.shape[-1], -1))
    weight.mul_(multiplier.unsqueeze(-1))
    if addend is not None:
        weight.add_(addend.unsqueeze(-1))
    return weight.flatten(-2).to(dtype)


def update(
    index: Tensor, offset: Tensor, levels: Tensor, multiplier: Tensor, gradient: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """Move latents by ``step`` (of a level's distance) against the sign of the loss's ``gradient`` (B, out, in) at the
    weight; index and offset (B, out, in) change in place -> sums over each group (B, out, groups) of gradient * level
    and of the gradient: gradients of multiplier and addend."""
    if Backend.of(index.device) is Backend.TRITON and gradient.dtype != torch.float64:
        from quantkit.kernels.triton import tuning as tuning_triton

        return tuning_triton.update(index, offset, levels, multiplier, gradient, round(step * ONE))
    return update_in_torch(index, offset, levels, multiplier, gradient, round(step * ONE))


def update_in_torch(
    index: Tensor, offset: Tensor, levels: Tensor, multiplier: Tensor, gradient: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """The twin of the kernel. ``step``: in units of 1 / `ONE`."""
    grouped, sums = group_sums(index, levels, multiplier.shape[-1], gradient)
    signs = grouped.sign().mul_(multiplier.sign().to(grouped.dtype).unsqueeze(-1)).flatten(-2)
    move(index, offset, signs.mul_(-step), len(levels) - 1)
    return sums


def group_sums(index: Tensor, levels: Tensor, groups: int, gradient: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gradient by groups (B, out, groups, n), and its two sums over each (see `update`)."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    grouped = gradient.to(wide).unflatten(-1, (groups, -1))
    level = levels.to(wide)[index.int()].unflatten(-1, (groups, -1))
    return grouped, ((grouped * level).sum(-1), grouped.sum(-1))


def move(index: Tensor, offset: Tensor, distance: Tensor, top: int) -> None:
    """Add whole ``distance`` in units of 1 / `ONE` (B, out, in) to latents, in place, up to half a step beyond the
    first and the last level."""
    latent = index.int().mul_(ONE).add_(offset).add_(distance.to(torch.int32))
    latent.clamp_(-_HALF, top * ONE + _HALF - 1).add_(_HALF)
    index.copy_(latent >> 16)
    offset.copy_((latent & (ONE - 1)) - _HALF)
