"""Coding groups of weights on given scales in plain torch, and what follows from it. The reference of the kernels.

A group of weights x with weights of the error h is coded on scale s (and offset o). From the residual r of that coding,

    A = sum h r^2     B = sum h r l     C = sum h l^2     D = sum h l     F = sum h r     S = sum h

follow the best scale and offset for the *same* codes (least squares), and by how much the error falls. Residuals, not
products of the weights: float32 then resolves errors that are tiny beside the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from quantkit.kernels.ggml_constants import HALF_MAX, HALF_TINY, RANGES, UNITS

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.ggml.types import BlockParams, BlockType


class Sums(NamedTuple):
    """A to F of this module's docstring, (blocks, groups) float32. D and F only where there is an offset."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    f: Tensor


def measure(kind: BlockType, x: Tensor, h: Tensor, scale: Tensor, offset: Tensor | None = None) -> Sums:
    """Code x (blocks, groups, group) to the nearest levels on scale and offset (blocks, groups)."""
    scale = scale.unsqueeze(-1)
    if offset is not None:
        x = x - offset.unsqueeze(-1)
    level = nearest_level(kind, x * inverse(scale))
    residual = x - scale * level
    weighted, weighted_level = h * residual, h * level
    a, b = (weighted * residual).sum(-1), (weighted * level).sum(-1)
    c = (weighted_level * level).sum(-1)
    return Sums(a, b, c, *((a, a) if offset is None else (weighted_level.sum(-1), weighted.sum(-1))))


def nearest_level(kind: BlockType, x: Tensor) -> Tensor:
    """The value among ``kind.levels`` nearest to each x."""
    if kind.uniform:
        return x.round().clamp_(kind.levels[0], kind.levels[-1])
    levels = torch.tensor(sorted(set(kind.levels)), dtype=x.dtype, device=x.device)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def nearest_codes(kind: BlockType, weight: Tensor, params: BlockParams) -> Tensor:
    """weight (..., out, in) float32 -> indices of the nearest levels, uint8."""
    scale, offset = params.scale().unsqueeze(-1), params.offset()
    x = weight.reshape(*scale.shape[:-1], kind.group)
    if offset is not None:
        x = x - offset.unsqueeze(-1)
    level = nearest_level(kind, x * inverse(scale))
    low, high = min(kind.levels), max(kind.levels)
    code = [kind.levels.index(value) if value in kind.levels else 0 for value in range(low, high + 1)]
    table = torch.tensor(code, dtype=torch.uint8, device=weight.device)
    return table[(level - low).int()].view(weight.shape)


def bits(kind: BlockType) -> int:
    return (len(kind.levels) - 1).bit_length()


def shares(kind: BlockType) -> list[float]:
    """Ranges tried for a group, in units of its own: its largest weight, or its width if the type has offsets. Negative
    ones, too, where the scale may be."""
    low, high, count = RANGES[bits(kind)]
    steps = torch.linspace(low, high, count).tolist()
    if kind.offset:  # one step less, and the middle of the range is a level: zero in rows of both signs
        return [*steps, kind.levels[-1] / (kind.levels[-1] - 1)]
    return steps + [-step for step in steps]


def matters(kind: BlockType) -> float:
    """The share of a group's energy (sum h x^2, about the mean if there is an offset) below which a weight doesn't
    stretch the range: an outlier of no importance. Some per cent of the error that the bits of a code leave."""
    return 0.05 * 4.0 ** -bits(kind)


def mattering_only(kind: BlockType, x: Tensor, h: Tensor, center: Tensor) -> Tensor:
    """x (blocks, groups, group), but the center (blocks, groups) instead of weights that don't matter."""
    center = center.unsqueeze(-1)
    energy = h * (x - center).square()
    return torch.where(energy > matters(kind) * energy.sum(-1, keepdim=True), x, center)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where that would be infinite."""
    return torch.where(scale.abs() > 1e-37, 1 / scale, 0.0)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 unless the denominator is positive."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def half(value: Tensor) -> Tensor:
    """The nearest float16."""
    return value.clamp(-HALF_MAX, HALF_MAX).half().float()


def nonzero_half(value: Tensor) -> Tensor:
    """The nearest float16, or the smallest one with the sign of the value: even that scale may code something."""
    rounded = half(value)
    return torch.where(rounded == 0, torch.where(value < 0, -HALF_TINY, HALF_TINY), rounded)


def farthest(values: Tensor) -> Tensor:
    """(..., n) -> (..., 1): the value farthest from 0."""
    return values.gather(-1, values.abs().argmax(-1, keepdim=True))


def per_block(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


Choice = tuple["Tensor", ...]
"""An error, then what has that error: all (blocks, 1) or (blocks, groups)."""


def better(new: Choice, old: Choice, tie: Tensor | float = 0.0) -> Choice:
    """For each block or group the choice with the smaller error, by more than ``tie`` if it is the new one."""
    better = new[0] + tie < old[0]
    return tuple(torch.where(better, a, b) for a, b in zip(new, old, strict=True))


def units(scale: Tensor, curvature: Tensor, limits: tuple[int, int]) -> list[Tensor]:
    """The three most promising d (blocks, 1): integers times d come nearest to the scales, by the curvature of each
    group's error."""
    largest = farthest(scale)
    ends = [limits[0] + i for i in range(UNITS if limits[0] else 0)] + [limits[1] - i for i in range(UNITS)]
    found = [nonzero_half(largest / end) for end in ends]
    errors = [per_block(curvature * (scale - d * (scale / d).round_().clamp_(*limits)).square_()) for d in found]
    order = torch.cat(errors, -1).argsort(-1)
    return list(torch.cat(found, -1).gather(-1, order[:, :3]).split(1, -1))
