"""The torch search for scales of the types that have offsets, too. See `quantkit.schemes.ggml.symmetric`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.kernels.ggml_constants import ENDS, PAIRS, TIE
from quantkit.schemes.ggml.measure import (
    Sums,
    better,
    farthest,
    half,
    mattering_only,
    measure,
    nonzero_half,
    per_block,
    ratio,
    shares,
    units,
)

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.ggml.measure import Choice
    from quantkit.schemes.ggml.types import BlockType


def with_offset(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    total = h.sum(-1)
    scale, offset, curvature, width, bottom = _pair_of_groups(kind, x, h, total)
    if kind.sub_scale is None or kind.sub_min is None:
        return *_stored_pair(kind, x, h, total, scale, offset), None, None
    error, zero = torch.full_like(scale[:, :1], torch.inf), torch.zeros_like(scale)
    best: Choice = (error, error, error, zero, zero)
    ds = [*units(scale, curvature, kind.sub_scale), nonzero_half(farthest(width) / kind.sub_scale[1])]
    dmins = [*units(-offset, total, kind.sub_min), nonzero_half(farthest(bottom) / -kind.sub_min[1])]
    for place, place_of_offset in PAIRS:
        d, dmin = ds[place], dmins[place_of_offset]
        sub, low, sums = _integer_pairs(kind, x, h, total, d, dmin, scale, offset)
        best = better((per_block(sums.a), d, dmin, sub, low), best)
        d, dmin = _refit(d, dmin, sub, low, sums, total)
        sums = measure(kind, x, h, d * sub, -dmin * low)
        best = better((per_block(sums.a), d, dmin, sub, low), best)
    return best[1], best[2], best[3].to(torch.int16), best[4].to(torch.int16)


def _solve(sums: Sums, total: Tensor, room: Tensor | float = torch.inf) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares steps of scale and offset for the same codes, and the error after them. The offset rises by no more
    than ``room``."""
    a, b, c, d, f = sums
    det = c * total - d * d
    shift = torch.where(det > 1e-6 * c * total, (f * c - b * d) / det, ratio(f, total))
    shift = torch.minimum(shift, torch.as_tensor(room, device=shift.device))
    step = ratio(b - shift * d, c)
    error = a - 2 * (step * b + shift * f) + step * step * c + 2 * step * shift * d + shift * shift * total
    return step, shift, error


def _pair_of_groups(kind: BlockType, x: Tensor, h: Tensor, total: Tensor) -> Choice:
    """The best scale and offset of each group alone, the curvature of the error along the scale, and the group's range:
    width of a step, bottom. One sign of dmin
    serves a block: offsets above 0 only where all weights are above 0."""
    limit = torch.where((x.amin((1, 2)) > 0) | (kind.offset == "added"), torch.inf, 0.0).unsqueeze(-1)
    mattering = mattering_only(kind, x, h, (h * x).sum(-1) / total)
    bottom, top = torch.minimum(mattering.amin(-1), limit), mattering.amax(-1)
    width, tie = (top - bottom) / kind.levels[-1], TIE * (h * x * x).sum(-1)
    best: Choice = (torch.full_like(width, torch.inf), width, bottom, torch.zeros_like(width))
    for clipped in (0.0, 0.5, 1.0):  # the share of what a smaller range leaves out that is left out at the bottom
        found: Choice = (torch.full_like(width, torch.inf), width, bottom)
        for share in shares(kind):
            scale = width * share
            offset = torch.minimum(bottom + clipped * (1 - share) * (top - bottom), limit)
            sums = measure(kind, x, h, scale, offset)
            step, shift, error = _solve(sums, total, limit - offset)
            found = better((error, scale + step, offset + shift), found, tie)
        _, scale, offset = found
        sums = measure(kind, x, h, scale, offset)
        step, shift, error = _solve(sums, total, limit - offset)
        best = better((error, scale + step, offset + shift, sums.c), best, tie)
    return *best[1:], width, bottom


def _stored_pair(
    kind: BlockType, x: Tensor, h: Tensor, total: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Float16 scale and offset: the best, its offset refitted on the rounded scale; what rounding the offset of a
    constant leaves; and ranges that meet the largest weight with one of the highest levels: some of their scales are
    hardly rounded, which decides if one weight is huge."""
    best: Choice = ((h * x * x).sum(-1), torch.zeros_like(scale), torch.zeros_like(scale))
    bottom, width = x.amin(-1), x.amax(-1) - x.amin(-1)
    for attempt in range(4 + ENDS):
        if attempt == 3:
            scale, offset = bottom - half(bottom), bottom
        elif attempt > 3:
            scale, offset = width / (kind.levels[-1] - (attempt - 4)), bottom
        d, dmin = nonzero_half(scale), half(offset)
        for _ in range(2):
            sums = measure(kind, x, h, d, dmin)
            best = better((sums.a, d, dmin), best)
            step, shift, _ = _solve(sums, total)
            scale, offset = d + step, dmin + shift
            dmin = half(dmin + ratio(sums.f, total))
    return best[1], best[2]


def _integer_pairs(
    kind: BlockType, x: Tensor, h: Tensor, total: Tensor, d: Tensor, dmin: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Sums]:
    """The sub-scale and sub-minimum of the least true error: next to scale / d, each with the minimum that suits it."""
    assert kind.sub_scale is not None
    assert kind.sub_min is not None
    zero = torch.zeros_like(scale)
    best: Choice = (torch.full_like(scale, torch.inf), *(zero,) * 6)
    middle, first_low = (scale / d).round_(), (-offset / dmin).round_().clamp_(*kind.sub_min)
    for step in (-1, 0, 1):
        sub, low = (middle + step).clamp_(*kind.sub_scale), first_low
        for _ in range(2):
            sums = measure(kind, x, h, d * sub, -dmin * low)
            best = better((*sums, sub, low), best)
            low = (low - sums.f / (total * dmin)).round_().clamp_(*kind.sub_min)
    return best[5], best[6], Sums(*best[:5])


def _refit(d: Tensor, dmin: Tensor, sub: Tensor, low: Tensor, sums: Sums, total: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares d and dmin of each block for the same integers and codes."""
    block = Sums(
        per_block(sums.a),
        per_block(sub * sums.b),
        per_block(sub * sub * sums.c),
        per_block(-low * sub * sums.d),
        per_block(-low * sums.f),
    )
    step, shift, _ = _solve(block, per_block(low * low * total))
    return nonzero_half(d + step), nonzero_half(dmin + shift)
