"""The search for scales in plain torch: what the compiled kernels are compared with, and what a GPU runs.

The sums A to F, and what they are good for: `quantkit.schemes.ggml.measure`.

A block: (1) each group alone, from a grid of ranges; (2) the d (and dmin) whose integer multiples come nearest to these
scales; (3) for each of them the integers of every group by the true error, then d (and dmin) by least squares. The
stored values of the least true error are kept. Idea of the grid and of the least squares: make_qx_quants,
make_qkx3_quants of ggml-quants.c; there groups are weighted otherwise, and their integers are only rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.kernels.ggml_constants import NEAR, NEIGHBOUR, POWERS, REFINED, TIE, WIDE
from quantkit.schemes.ggml.measure import (
    better,
    farthest,
    mattering_only,
    measure,
    nonzero_half,
    per_block,
    ratio,
    shares,
    units,
)
from quantkit.schemes.ggml.offset import with_offset
from quantkit.schemes.ggml.types import BlockParams, BlockType

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.ggml.measure import Choice

CHUNK, CHUNK_OF_GPU = 1 << 18, 1 << 24
"""Weights searched at once: on a processor what stays in its cache, elsewhere what fills a GPU."""


def search(kind: BlockType, weight: Tensor, importance: Tensor) -> BlockParams:
    """weight (B, out, in), importance (B, in), float32, checked -> scales (B * out, blocks or groups)."""
    _, out, in_features = weight.shape
    rows = weight.reshape(-1, in_features)
    step = max(1, (CHUNK if weight.device.type == "cpu" else CHUNK_OF_GPU) // in_features)
    parts: list[tuple[Tensor | None, ...]] = []
    for start in range(0, max(1, len(rows)), step):
        part = rows[start : start + step]
        matrix = torch.arange(start, start + len(part), device=weight.device) // max(1, out)
        x = part.reshape(-1, kind.groups, kind.group)
        found = _search_blocks(kind, x, importance[matrix].view(x.shape))
        parts.append(tuple(None if values is None else values.reshape(len(part), -1) for values in found))
    d, dmin, sub_scale, sub_min = (_joined(values) for values in zip(*parts, strict=True))
    assert d is not None
    return BlockParams(d, dmin, sub_scale, sub_min)


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _search_blocks(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
    """x, h (blocks, groups, group) -> d, dmin, sub_scale, sub_min."""
    if kind.name == "MXFP4":
        return _power_of_two(kind, x, h), None, None, None
    return with_offset(kind, x, h) if kind.offset else _without_offset(kind, x, h)


def _without_offset(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
    scale, curvature, largest = _scale_of_groups(kind, x, h)
    if kind.sub_scale is None:
        return _stored_scale(kind, x, h, scale, largest), None, None, None
    reach = farthest(largest)
    best: Choice = (torch.full_like(reach, torch.inf), reach, torch.zeros_like(scale))
    for d in units(scale, curvature, kind.sub_scale):
        best = _integers_and_unit(kind, x, h, d, scale, NEAR, best)
    # The smallest d that still reaches the largest weight, with the sub-scale at its end.
    d = nonzero_half(reach / (kind.levels[0] * kind.sub_scale[0]))
    at_end = torch.where(largest.abs() == reach.abs(), d * kind.sub_scale[0], scale)
    best = _integers_and_unit(kind, x, h, d, at_end, NEAR, best)
    best = _integers_and_unit(kind, x, h, best[1], best[1] * best[2], WIDE, best)
    return best[1], None, best[2].to(torch.int16), None


def _scale_of_groups(kind: BlockType, x: Tensor, h: Tensor) -> Choice:
    """The best scale of each group alone (sign and size are free), the curvature of its error, and the group's largest
    weight that matters."""
    tie = TIE * (h * x * x).sum(-1)
    reach = farthest(mattering_only(kind, x, h, torch.zeros_like(tie)))[..., 0]
    largest = reach.abs() / max(map(abs, kind.levels))
    best: Choice = (torch.full_like(largest, torch.inf), largest, torch.zeros_like(largest))
    tried = shares(kind)
    refined = 0 if kind.sub_scale else REFINED
    for attempt in range(len(tried) + refined):
        if attempt < len(tried):
            scale = largest * tried[attempt]
        else:  # between the best range and its neighbours
            part = ((attempt - len(tried)) * 2 - refined + 1) / (refined + 1)
            scale = best[1] * (1 + part * (tried[1] - tried[0]))
        sums = measure(kind, x, h, scale)
        step = ratio(sums.b, sums.c)
        best = better((sums.a - step * sums.b, scale + step, sums.c), best, tie)
    return best[1], best[2], reach


def _stored_scale(kind: BlockType, x: Tensor, h: Tensor, scale: Tensor, reach: Tensor) -> Tensor:
    """The best of: the scale rounded to float16, refitted and rounded again, those that just reach the largest weight;
    then of its neighbours."""
    best: Choice = ((h * x * x).sum(-1), torch.zeros_like(scale))
    for attempt in range(9):
        if 3 <= attempt < 5:
            scale = reach / (min(kind.levels), max(kind.levels))[attempt - 3]
        elif attempt >= 5:
            scale = best[1] * (1 + (NEIGHBOUR if attempt % 2 else -NEIGHBOUR))
        scale = nonzero_half(scale)
        sums = measure(kind, x, h, scale)
        best = better((sums.a, scale), best)
        scale = scale + ratio(sums.b, sums.c)
    return best[1]


def _integers_and_unit(
    kind: BlockType, x: Tensor, h: Tensor, d: Tensor, scale: Tensor, near: int, best: Choice
) -> Choice:
    """Integers for d, then d for the integers: the better of that and the best so far (error, d, sub-scales)."""
    error, slope, norm, sub = _integers(kind, x, h, d, scale, near)
    best = better((per_block(error), d, sub), best)
    d = nonzero_half(d + ratio(per_block(sub * slope), per_block(sub * sub * norm)))
    return better((per_block(measure(kind, x, h, d * sub).a), d, sub), best)


def _integers(kind: BlockType, x: Tensor, h: Tensor, d: Tensor, scale: Tensor, near: int) -> Choice:
    """The sub-scales of the least true error next to scale / d: error, slope and curvature (B, C), sub-scale."""
    assert kind.sub_scale is not None
    zero = torch.zeros_like(scale)
    best: Choice = ((h * x * x).sum(-1), zero, zero, zero)
    middle = (scale / d).round_()
    for step in range(-near, near + 1):
        sub = (middle + step).clamp_(*kind.sub_scale)
        sums = measure(kind, x, h, d * sub)
        best = better((sums.a, sums.b, sums.c, sub), best)
    return best


def _power_of_two(kind: BlockType, x: Tensor, h: Tensor) -> Tensor:
    """MXFP4: the best of the powers of two near the range."""
    _, unit = torch.frexp(x.abs().amax(-1))  # the largest weight is 0.5..1 times 2**unit
    # Products of huge weights overflow, those of tiny ones vanish. In two steps: 2**-unit itself might overflow.
    first = (-unit // 2).unsqueeze(-1)
    x = torch.ldexp(torch.ldexp(x, first), -unit.unsqueeze(-1) - first)
    _, exponent = torch.frexp(mattering_only(kind, x, h, torch.zeros_like(x[..., 0])).abs().amax(-1))
    exponent = exponent + unit
    best: Choice = (torch.full_like(x[..., 0], torch.inf), exponent)
    for step in POWERS:
        power = (exponent + step).clamp(-128, 126)
        scale = torch.ldexp(torch.ones_like(best[0]), power - unit)
        best = better((measure(kind, x, h, scale).a, power), best)
    return torch.ldexp(torch.ones_like(best[0]), best[1])
