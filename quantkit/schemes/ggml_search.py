"""The search for scales in plain torch: what the compiled kernels are compared with, and what a GPU runs.

A group of weights x with weights of the error h is coded on scale s (and offset o). From the residual r of that coding,

    A = sum h r^2     B = sum h r l     C = sum h l^2     D = sum h l     F = sum h r     S = sum h

follow the best scale and offset for the *same* codes (least squares), and by how much the error falls. Residuals, not
products of the weights: float32 then resolves errors that are tiny beside the weights.

A block: (1) each group alone, from a grid of ranges; (2) the d (and dmin) whose integer multiples come nearest to these
scales; (3) for each of them the integers of every group by the true error, then d (and dmin) by least squares. The
stored values of the least true error are kept. Idea of the grid and of the least squares: make_qx_quants,
make_qkx3_quants of ggml-quants.c; there groups are weighted otherwise, and their integers are only rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from quantkit.schemes.ggml_types import BlockParams, BlockType

if TYPE_CHECKING:
    from torch import Tensor

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
"""The smallest float16."""
CHUNK, CHUNK_OF_GPU = 1 << 18, 1 << 24
"""Weights searched at once: on a processor what stays in its cache, elsewhere what fills a GPU."""
RANGES = {
    2: (0.4, 1.1, 12),
    3: (0.35, 1.4, 14),
    4: (0.5, 1.3, 20),
    5: (0.7, 1.3, 24),
    6: (0.85, 1.35, 18),
    8: (0.9, 1.2, 12),
}
"""Ranges tried, by bits of a code: least and greatest share of the group's own range, and how many. Beyond 1 no weight
takes the outermost levels, but those that matter may lie nearer to their levels."""
TIE = 1e-9
"""Errors that differ by less than this share of a group's energy count as equal: the first range wins, in all groups
alike, and their scales fit together."""
NEAR, WIDE = 1, 4
"""How far from scale / d the integer of a group is looked for: on each d, and at last on the best."""
NEIGHBOUR = 1.001 * 2.0**-11
"""A float16 grown by this share is rounded to the next one."""
UNITS = 15
"""How many integers the largest scale of a block may become, from each end."""
PAIRS = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (2, 1))
"""Which of the three best d and dmin are tried together."""

ENDS = 8
"""How many of the highest levels the largest weight of a block of its own scale and offset is tried on."""


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


def shares(kind: BlockType) -> list[float]:
    """Ranges tried for a group, in units of its own: its largest weight, or its width if the type has offsets. Negative
    ones, too, where the scale may be."""
    low, high, count = RANGES[_bits(kind)]
    steps = torch.linspace(low, high, count).tolist()
    if kind.offset:  # one step less, and the middle of the range is a level: zero in rows of both signs
        return [*steps, kind.levels[-1] / (kind.levels[-1] - 1)]
    return steps + [-step for step in steps]


def matters(kind: BlockType) -> float:
    """The share of a group's energy (sum h x^2, about the mean if there is an offset) below which a weight doesn't
    stretch the range: an outlier of no importance. Some per cent of the error that the bits of a code leave."""
    return 0.05 * 4.0 ** -_bits(kind)


def nearest_codes(kind: BlockType, weight: Tensor, params: BlockParams) -> Tensor:
    """weight (..., out, in) float32 -> indices of the nearest levels, uint8."""
    scale, offset = params.scale().unsqueeze(-1), params.offset()
    x = weight.reshape(*scale.shape[:-1], kind.group)
    if offset is not None:
        x = x - offset.unsqueeze(-1)
    level = _nearest_level(kind, x * _inverse(scale))
    low, high = min(kind.levels), max(kind.levels)
    code = [kind.levels.index(value) if value in kind.levels else 0 for value in range(low, high + 1)]
    table = torch.tensor(code, dtype=torch.uint8, device=weight.device)
    return table[(level - low).int()].view(weight.shape)


def _bits(kind: BlockType) -> int:
    return (len(kind.levels) - 1).bit_length()


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _search_blocks(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
    """x, h (blocks, groups, group) -> d, dmin, sub_scale, sub_min."""
    if kind.name == "MXFP4":
        return _power_of_two(kind, x, h), None, None, None
    return _with_offset(kind, x, h) if kind.offset else _without_offset(kind, x, h)


class Sums(NamedTuple):
    """A to F of this module's docstring, (blocks, groups) float32. D and F only where there is an offset."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    f: Tensor


def _measure(kind: BlockType, x: Tensor, h: Tensor, scale: Tensor, offset: Tensor | None = None) -> Sums:
    """Code x (blocks, groups, group) to the nearest levels on scale and offset (blocks, groups)."""
    scale = scale.unsqueeze(-1)
    if offset is not None:
        x = x - offset.unsqueeze(-1)
    level = _nearest_level(kind, x * _inverse(scale))
    residual = x - scale * level
    weighted, weighted_level = h * residual, h * level
    a, b = (weighted * residual).sum(-1), (weighted * level).sum(-1)
    c = (weighted_level * level).sum(-1)
    return Sums(a, b, c, *((a, a) if offset is None else (weighted_level.sum(-1), weighted.sum(-1))))


def _nearest_level(kind: BlockType, x: Tensor) -> Tensor:
    """The value among ``kind.levels`` nearest to each x."""
    if kind.uniform:
        return x.round().clamp_(kind.levels[0], kind.levels[-1])
    levels = torch.tensor(sorted(set(kind.levels)), dtype=x.dtype, device=x.device)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where that would be infinite."""
    return torch.where(scale.abs() > 1e-37, 1 / scale, 0.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 unless the denominator is positive."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _half(value: Tensor) -> Tensor:
    """The nearest float16."""
    return value.clamp(-HALF_MAX, HALF_MAX).half().float()


def _nonzero_half(value: Tensor) -> Tensor:
    """The nearest float16, or the smallest one with the sign of the value: even that scale may code something."""
    rounded = _half(value)
    return torch.where(rounded == 0, torch.where(value < 0, -HALF_TINY, HALF_TINY), rounded)


def _mattering(kind: BlockType, x: Tensor, h: Tensor, center: Tensor) -> Tensor:
    """x (blocks, groups, group), but the center (blocks, groups) instead of weights that don't matter."""
    center = center.unsqueeze(-1)
    energy = h * (x - center).square()
    return torch.where(energy > matters(kind) * energy.sum(-1, keepdim=True), x, center)


def _per_block(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


Choice = tuple["Tensor", ...]
"""An error, then what has that error: all (blocks, 1) or (blocks, groups)."""


def _better(new: Choice, old: Choice, tie: Tensor | float = 0.0) -> Choice:
    """Of each block or group the choice with the smaller error, by more than ``tie`` if it is the new one."""
    better = new[0] + tie < old[0]
    return tuple(torch.where(better, a, b) for a, b in zip(new, old, strict=True))


def _without_offset(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
    scale, curvature = _scale_of_groups(kind, x, h)
    mattering = _mattering(kind, x, h, torch.zeros_like(scale)).flatten(1 if kind.sub_scale else 2)
    reach = mattering.gather(-1, mattering.abs().argmax(-1, keepdim=True))  # (blocks, 1)
    if kind.sub_scale is None:
        return _stored_scale(kind, x, h, scale, reach[..., 0]), None, None, None
    best: Choice = (torch.full_like(reach, torch.inf), reach, torch.zeros_like(scale))
    # The smallest d that still reaches the largest weight.
    smallest = _nonzero_half(reach / (kind.levels[0] * kind.sub_scale[0]))
    for d in (*_units(scale, curvature, kind.sub_scale), smallest):
        best = _integers_and_unit(kind, x, h, d, scale, NEAR, best)
    best = _integers_and_unit(kind, x, h, best[1], best[1] * best[2], WIDE, best)
    return best[1], None, best[2].to(torch.int16), None


def _scale_of_groups(kind: BlockType, x: Tensor, h: Tensor) -> Choice:
    """The best scale of each group alone, and the curvature of its error: sign and size are free."""
    tie = TIE * (h * x * x).sum(-1)
    largest = _mattering(kind, x, h, torch.zeros_like(tie)).abs().amax(-1) / max(map(abs, kind.levels))
    best: Choice = (torch.full_like(largest, torch.inf), largest, torch.zeros_like(largest))
    for share in shares(kind):
        scale = largest * share
        sums = _measure(kind, x, h, scale)
        step = _ratio(sums.b, sums.c)
        best = _better((sums.a - step * sums.b, scale + step, sums.c), best, tie)
    return best[1:]


def _stored_scale(kind: BlockType, x: Tensor, h: Tensor, scale: Tensor, reach: Tensor) -> Tensor:
    """The best of: the scale rounded to float16, refitted and rounded again, those that just reach the largest weight;
    then of its neighbours."""
    best: Choice = ((h * x * x).sum(-1), torch.zeros_like(scale))
    for attempt in range(9):
        if 3 <= attempt < 5:
            scale = reach / (min(kind.levels), max(kind.levels))[attempt - 3]
        elif attempt >= 5:
            scale = best[1] * (1 + (NEIGHBOUR if attempt % 2 else -NEIGHBOUR))
        scale = _nonzero_half(scale)
        sums = _measure(kind, x, h, scale)
        best = _better((sums.a, scale), best)
        scale = scale + _ratio(sums.b, sums.c)
    return best[1]


def _integers_and_unit(
    kind: BlockType, x: Tensor, h: Tensor, d: Tensor, scale: Tensor, near: int, best: Choice
) -> Choice:
    """Integers for d, then d for the integers: the better of that and the best so far (error, d, sub-scales)."""
    error, slope, norm, sub = _integers(kind, x, h, d, scale, near)
    best = _better((_per_block(error), d, sub), best)
    d = _nonzero_half(d + _ratio(_per_block(sub * slope), _per_block(sub * sub * norm)))
    return _better((_per_block(_measure(kind, x, h, d * sub).a), d, sub), best)


def _units(scale: Tensor, curvature: Tensor, limits: tuple[int, int]) -> list[Tensor]:
    """The three most promising d (blocks, 1): integers times d come nearest to the scales, by the curvature of each
    group's error."""
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    ends = [limits[0] + i for i in range(UNITS if limits[0] else 0)] + [limits[1] - i for i in range(UNITS)]
    found = [_nonzero_half(largest / end) for end in ends]
    errors = [_per_block(curvature * (scale - d * (scale / d).round_().clamp_(*limits)).square_()) for d in found]
    order = torch.cat(errors, -1).argsort(-1)
    return list(torch.cat(found, -1).gather(-1, order[:, :3]).split(1, -1))


def _integers(kind: BlockType, x: Tensor, h: Tensor, d: Tensor, scale: Tensor, near: int) -> Choice:
    """The sub-scales of the least true error next to scale / d: error, slope and curvature (B, C), sub-scale."""
    assert kind.sub_scale is not None
    zero = torch.zeros_like(scale)
    best: Choice = ((h * x * x).sum(-1), zero, zero, zero)
    middle = (scale / d).round_()
    for step in range(-near, near + 1):
        sub = (middle + step).clamp_(*kind.sub_scale)
        sums = _measure(kind, x, h, d * sub)
        best = _better((sums.a, sums.b, sums.c, sub), best)
    return best


def _with_offset(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    total = h.sum(-1)
    scale, offset, curvature = _pair_of_groups(kind, x, h, total)
    if kind.sub_scale is None or kind.sub_min is None:
        return *_stored_pair(kind, x, h, total, scale, offset), None, None
    error, zero = torch.full_like(scale[:, :1], torch.inf), torch.zeros_like(scale)
    best: Choice = (error, error, error, zero, zero)
    units, units_of_offset = _units(scale, curvature, kind.sub_scale), _units(-offset, total, kind.sub_min)
    for place, place_of_offset in PAIRS:
        d, dmin = units[place], units_of_offset[place_of_offset]
        sub, low, sums = _integer_pairs(kind, x, h, total, d, dmin, scale, offset)
        best = _better((_per_block(sums.a), d, dmin, sub, low), best)
        d, dmin = _refit(d, dmin, sub, low, sums, total)
        sums = _measure(kind, x, h, d * sub, -dmin * low)
        best = _better((_per_block(sums.a), d, dmin, sub, low), best)
    return best[1], best[2], best[3].to(torch.int16), best[4].to(torch.int16)


def _solve(sums: Sums, total: Tensor, room: Tensor | float = torch.inf) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares steps of scale and offset for the same codes, and the error after them. The offset rises by no more
    than ``room``."""
    a, b, c, d, f = sums
    det = c * total - d * d
    shift = torch.where(det > 1e-6 * c * total, (f * c - b * d) / det, _ratio(f, total))
    shift = torch.minimum(shift, torch.as_tensor(room, device=shift.device))
    step = _ratio(b - shift * d, c)
    error = a - 2 * (step * b + shift * f) + step * step * c + 2 * step * shift * d + shift * shift * total
    return step, shift, error


def _pair_of_groups(kind: BlockType, x: Tensor, h: Tensor, total: Tensor) -> Choice:
    """The best scale and offset of each group alone, and the curvature of the error along the scale. One sign of dmin
    serves a block: offsets above 0 only where all weights are above 0."""
    limit = torch.where((x.amin((1, 2)) > 0) | (kind.offset == "added"), torch.inf, 0.0).unsqueeze(-1)
    mattering = _mattering(kind, x, h, (h * x).sum(-1) / total)
    bottom, top = torch.minimum(mattering.amin(-1), limit), mattering.amax(-1)
    width, tie = (top - bottom) / kind.levels[-1], TIE * (h * x * x).sum(-1)
    best: Choice = (torch.full_like(width, torch.inf), width, bottom, torch.zeros_like(width))
    for clipped in (0.0, 0.5, 1.0):  # the share of what a smaller range leaves out that is left out at the bottom
        found: Choice = (torch.full_like(width, torch.inf), width, bottom)
        for share in shares(kind):
            scale = width * share
            offset = torch.minimum(bottom + clipped * (1 - share) * (top - bottom), limit)
            sums = _measure(kind, x, h, scale, offset)
            step, shift, error = _solve(sums, total, limit - offset)
            found = _better((error, scale + step, offset + shift), found, tie)
        _, scale, offset = found
        sums = _measure(kind, x, h, scale, offset)
        step, shift, error = _solve(sums, total, limit - offset)
        best = _better((error, scale + step, offset + shift, sums.c), best, tie)
    return best[1:]


def _stored_pair(
    kind: BlockType, x: Tensor, h: Tensor, total: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Float16 scale and offset: the best, its offset refitted on the rounded scale; what rounding the offset of a
    constant leaves; and ranges that meet the largest weight with one of the highest levels: some of their scales are
    hardly rounded, which decides if one weight is huge."""
    best: Choice = ((h * x * x).sum(-1), torch.zeros_like(scale), torch.zeros_like(scale))
    mattering = _mattering(kind, x, h, (h * x).sum(-1) / total)
    bottom, width = mattering.amin(-1), mattering.amax(-1) - mattering.amin(-1)
    for attempt in range(4 + ENDS):
        if attempt == 3:
            scale, offset = bottom - _half(bottom), bottom
        elif attempt > 3:
            scale, offset = width / (kind.levels[-1] - (attempt - 4)), bottom
        d, dmin = _nonzero_half(scale), _half(offset)
        for _ in range(2):
            sums = _measure(kind, x, h, d, dmin)
            best = _better((sums.a, d, dmin), best)
            step, shift, _ = _solve(sums, total)
            scale, offset = d + step, dmin + shift
            dmin = _half(dmin + _ratio(sums.f, total))
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
            sums = _measure(kind, x, h, d * sub, -dmin * low)
            best = _better((*sums, sub, low), best)
            low = (low - sums.f / (total * dmin)).round_().clamp_(*kind.sub_min)
    return best[5], best[6], Sums(*best[:5])


def _refit(d: Tensor, dmin: Tensor, sub: Tensor, low: Tensor, sums: Sums, total: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares d and dmin of each block for the same integers and codes."""
    block = Sums(
        _per_block(sums.a),
        _per_block(sub * sums.b),
        _per_block(sub * sub * sums.c),
        _per_block(-low * sub * sums.d),
        _per_block(-low * sums.f),
    )
    step, shift, _ = _solve(block, _per_block(low * low * total))
    return _nonzero_half(d + step), _nonzero_half(dmin + shift)


def _power_of_two(kind: BlockType, x: Tensor, h: Tensor) -> Tensor:
    """MXFP4: the best of the powers of two near the range."""
    _, unit = torch.frexp(x.abs().amax(-1))  # the largest weight is 0.5..1 times 2**unit
    x = torch.ldexp(x, -unit.unsqueeze(-1))  # products of huge weights overflow, those of tiny ones vanish
    _, exponent = torch.frexp(_mattering(kind, x, h, torch.zeros_like(x[..., 0])).abs().amax(-1))
    exponent = exponent + unit
    best: Choice = (torch.full_like(x[..., 0], torch.inf), exponent)
    for step in (-3, -2, -4, -5):
        power = (exponent + step).clamp(-128, 126)
        scale = torch.ldexp(torch.ones_like(best[0]), power - unit)
        best = _better((_measure(kind, x, h, scale).a, power), best)
    return torch.ldexp(torch.ones_like(best[0]), best[1])
