"""The search for scales in plain torch: what the compiled kernels are compared with, and what a GPU runs.

A group of weights x with weights of the error h is coded on scale s (and offset o). From the residual r of that coding,

    A = sum h r^2     B = sum h r l     C = sum h l^2     D = sum h l     F = sum h r     S = sum h

follow the best scale and offset for the *same* codes (least squares), and by how much the error falls. Residuals, not
products of the weights: float32 then resolves errors that are tiny beside the weights.

A block: (1) each group alone, from a grid of ranges; (2) d (and dmin) whose integer multiples meet these scales;
(3) integers of each group by the true error, d by least squares, and again; the best stored values seen are kept.
Idea of the candidates and of the least squares: make_qx_quants, make_qkx3_quants of ggml-quants.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from quantkit.schemes.ggml_types import BlockParams, BlockType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
"""The smallest float16."""
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights searched at once: on a processor what stays in its cache, on a GPU what fills it."""
RANGES = {2: (0.35, 1.25, 16), 3: (0.4, 1.4, 20), 4: (0.5, 1.2, 20), 5: (0.7, 1.15, 16), 6: (0.8, 1.1, 12)}
"""Ranges tried by bits of a code: least and greatest share of the group's own range, and how many. 8 bits: as 6."""
ROUNDS = 2


def search(kind: BlockType, weight: Tensor, importance: Tensor) -> BlockParams:
    """weight (B, out, in), importance (B, in), float32, checked -> scales with leading dimension B * out."""
    rows = max(1, CHUNK.get(weight.device.type, CHUNK["cuda"]) // weight.shape[-1])
    parts = [
        _search_rows(kind, matrix[start : start + rows], matrix_importance)
        for matrix, matrix_importance in zip(weight, importance, strict=True)
        for start in range(0, matrix.shape[0], rows)
    ]
    if not parts:
        parts = [_search_rows(kind, weight.new_zeros(1, weight.shape[-1]), weight.new_ones(weight.shape[-1]))]
        parts = [BlockParams(*(None if v is None else v[:0] for v in _fields(parts[0])))]  # pyright: ignore[reportArgumentType]
    joined = [None if field[0] is None else torch.cat(field) for field in zip(*map(_fields, parts), strict=True)]
    return BlockParams(*joined)  # pyright: ignore[reportArgumentType]


def _fields(params: BlockParams) -> tuple[Tensor | None, ...]:
    return params.d, params.dmin, params.sub_scale, params.sub_min


def shares(kind: BlockType) -> list[float]:
    """Ranges tried for a group, in units of its own: its largest weight, or its width if the type has offsets. Negative
    ones, too, where the scale may be."""
    low, high, count = RANGES[_bits(kind)]
    steps = torch.linspace(low, high, count).tolist()
    return steps if kind.offset else steps + [-step for step in steps]


def _search_rows(kind: BlockType, weight: Tensor, importance: Tensor) -> BlockParams:
    """weight (rows, in), importance (in,) -> scales (rows, blocks or groups)."""
    rows, in_features = weight.shape
    x = weight.view(-1, kind.groups, kind.group)
    h = importance.view(-1, kind.groups, kind.group)
    h = h.expand(rows, *h.shape).reshape(x.shape)
    if kind.name == "MXFP4":
        return BlockParams(_power_of_two(kind, x, h).view(rows, -1))
    found = _with_offset(kind, x, h) if kind.offset else _without_offset(kind, x, h)
    return BlockParams(*(None if value is None else value.reshape(rows, -1) for value in found))  # pyright: ignore[reportArgumentType]


# --- coding a group -------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """A to F of this module's docstring, (blocks, groups) float32."""

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
    level = nearest_level(kind, x * _inverse(scale))
    residual = x - scale * level
    weighted, weighted_level = h * residual, h * level
    return Sums(
        (weighted * residual).sum(-1),
        (weighted * level).sum(-1),
        (weighted_level * level).sum(-1),
        weighted_level.sum(-1) if offset is not None else scale[..., 0],
        weighted.sum(-1) if offset is not None else scale[..., 0],
    )


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
    level = nearest_level(kind, x * _inverse(scale))
    if kind.uniform:
        return (level - kind.levels[0]).byte().view(weight.shape)
    low = min(kind.levels)
    code = [kind.levels.index(value) if value in kind.levels else 0 for value in range(low, max(kind.levels) + 1)]
    table = torch.tensor(code, dtype=torch.uint8, device=weight.device)
    return table[(level - low).int()].view(weight.shape)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where that would be infinite."""
    return torch.where(scale.abs() > 1e-37, 1 / scale, 0.0)


def _half(value: Tensor, like: Tensor | None = None) -> Tensor:
    """Nearest float16, never zero: the smallest with the sign of the value (its scale still may code something)."""
    rounded = value.clamp(-HALF_MAX, HALF_MAX).half().float()
    return torch.where(rounded == 0, torch.where(value < 0, -HALF_TINY, HALF_TINY), rounded)


def _bits(kind: BlockType) -> int:
    return min(6, (len(kind.levels) - 1).bit_length())


def _per_block(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


# --- one scale ------------------------------------------------------------------------------------------------------


def _scale_of_groups(kind: BlockType, x: Tensor, h: Tensor) -> Tensor:
    """The best scale of each group alone, (blocks, groups): sign and size are free."""
    low, high, count = RANGES[_bits(kind)]
    largest = x.abs().amax(-1) / max(map(abs, kind.levels))
    best_error, best = torch.full_like(largest, torch.inf), largest
    for share in torch.linspace(low, high, count).tolist():
        for sign in (1.0, -1.0):
            scale = largest * (sign * share)
            sums = measure(kind, x, h, scale)
            step = torch.where(sums.c > 0, sums.b / sums.c, 0.0)
            error = sums.a - step * sums.b
            better = error < best_error
            best_error, best = torch.where(better, error, best_error), torch.where(better, scale + step, best)
    return best


def _without_offset(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor, None, Tensor | None]:
    scale = _scale_of_groups(kind, x, h)
    if kind.sub_scale is None:
        return _stored_scale(kind, x, h, scale), None, None
    sums = measure(kind, x, h, scale)
    best_error, best_d, best_sub = torch.full_like(scale[:, :1], torch.inf), scale[:, :1], torch.zeros_like(scale)
    for d in _units(scale, sums.c, kind.sub_scale):
        for _ in range(ROUNDS):
            sub, sums = _integers(kind, x, h, d, scale)
            error = _per_block(sums.a)
            better = error < best_error
            best_error, best_d = torch.where(better, error, best_error), torch.where(better, d, best_d)
            best_sub = torch.where(better, sub, best_sub)
            norm = _per_block(sub * sub * sums.c)
            d = _half(d + torch.where(norm > 0, _per_block(sub * sums.b) / norm, 0.0))
            sums = measure(kind, x, h, d * sub)
            error = _per_block(sums.a)
            better = error < best_error
            best_error, best_d = torch.where(better, error, best_error), torch.where(better, d, best_d)
            best_sub = torch.where(better, sub, best_sub)
    return best_d, None, best_sub.to(torch.int16)


def _stored_scale(kind: BlockType, x: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """The best float16 near the best scale, or the one that just reaches the largest weight."""
    sums = measure(kind, x, h, scale)
    best, best_error = torch.zeros_like(scale), (h * x * x).sum(-1)
    again = scale + torch.where(sums.c > 0, sums.b / sums.c, 0.0)
    index = x.abs().argmax(-1, keepdim=True)
    reaching = x.gather(-1, index)[..., 0]
    for candidate in (again, again * (1 + 2.0**-11), again * (1 - 2.0**-11), *(reaching / end for end in _ends(kind))):
        candidate = _half(candidate)
        error = measure(kind, x, h, candidate).a
        better = error < best_error
        best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
    return best


def _ends(kind: BlockType) -> tuple[int, int]:
    return min(kind.levels), max(kind.levels)


def _units(scale: Tensor, curvature: Tensor, limits: tuple[int, int], keep: int = 3) -> Iterator[Tensor]:
    """The ``keep`` most promising d (blocks, 1): integers times d come nearest to the scales, by the curvature of each
    group's error."""
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    found: list[Tensor] = []
    errors: list[Tensor] = []
    for end in limits:
        if end == 0:
            continue
        for share in torch.linspace(0.7, 1.05, 15).tolist():
            d = _half(largest / (end * share))
            sub = (scale / d).round_().clamp_(*limits)
            found.append(d)
            errors.append(_per_block(curvature * (scale - d * sub).square_()))
    units, order = torch.cat(found, -1), torch.cat(errors, -1).argsort(-1)
    for place in range(keep):
        yield units.gather(-1, order[:, place : place + 1])


def _integers(kind: BlockType, x: Tensor, h: Tensor, d: Tensor, scale: Tensor) -> tuple[Tensor, Sums]:
    """The sub-scales of the least true error next to scale / d."""
    assert kind.sub_scale is not None
    middle = (scale / d).round_()
    best, best_sums = torch.zeros_like(scale), measure(kind, x, h, torch.zeros_like(scale))
    for step in (0, -1, 1):
        sub = (middle + step).clamp_(*kind.sub_scale)
        sums = measure(kind, x, h, d * sub)
        better = sums.a < best_sums.a
        best = torch.where(better, sub, best)
        best_sums = Sums(*(torch.where(better, new, old) for new, old in zip(sums, best_sums, strict=True)))
    return best, best_sums


# --- scale and offset -----------------------------------------------------------------------------------------------


def _with_offset(kind: BlockType, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    total = h.sum(-1)
    scale, offset, sums = _pair_of_groups(kind, x, h, total)
    if kind.sub_scale is None or kind.sub_min is None:
        d, dmin = _stored_pair(kind, x, h, total, scale, offset)
        return d, dmin, None, None
    best_error = torch.full_like(scale[:, :1], torch.inf)
    best = (scale[:, :1], offset[:, :1], torch.zeros_like(scale), torch.zeros_like(scale))
    d_candidates = list(_units(scale, sums.c, kind.sub_scale, keep=2))
    dmin_candidates = list(_units(-offset, total, kind.sub_min, keep=1))
    for d in d_candidates:
        for dmin in dmin_candidates:
            for _ in range(ROUNDS):
                sub, low, sums = _integer_pairs(kind, x, h, total, d, dmin, scale, offset)
                for refit in (False, True):
                    if refit:
                        d, dmin = _refit(d, dmin, sub, low, sums, total)
                        sums = measure(kind, x, h, d * sub, -dmin * low)
                    error = _per_block(sums.a)
                    better = error < best_error
                    best_error = torch.where(better, error, best_error)
                    now = (d, dmin, sub, low)
                    best = tuple(torch.where(better, new, old) for new, old in zip(now, best, strict=True))
    d, dmin, sub, low = best
    return d, dmin, sub.to(torch.int16), low.to(torch.int16)


def _solve(sums: Sums, total: Tensor, free: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares steps of scale and offset, and the error after them."""
    det = sums.c * total - sums.d * sums.d
    usable = det > 1e-6 * sums.c * total
    inverse = torch.where(usable, 1 / det, 0.0)
    step = (sums.b * total - sums.f * sums.d) * inverse
    shift = torch.where(usable, (sums.f * sums.c - sums.b * sums.d) * inverse, sums.f / total)
    return step, shift, sums.a - step * sums.b - shift * sums.f


def _pair_of_groups(kind: BlockType, x: Tensor, h: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Sums]:
    """The best scale and offset of each group alone; the offset is not above 0 if it will be subtracted."""
    top = float(kind.levels[-1])
    least, most = x.amin(-1), x.amax(-1)
    if kind.offset == "subtracted":
        least = least.clamp_max(0)
    low, high, count = RANGES[_bits(kind)]
    best_error = torch.full_like(least, torch.inf)
    best = ((most - least) / top, least)
    for share in torch.linspace(low, high, count).tolist():
        scale, offset = (most - least) * (share / top), least * share if kind.offset == "subtracted" else least
        for _ in range(ROUNDS):
            sums = measure(kind, x, h, scale, offset)
            step, shift, _ = _solve(sums, total, free=False)
            scale, offset = scale + step, offset + shift
            if kind.offset == "subtracted":
                offset = offset.clamp_max(0)
        error = measure(kind, x, h, scale, offset).a
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = tuple(torch.where(better, new, old) for new, old in zip((scale, offset), best, strict=True))
    return *best, measure(kind, x, h, *best)


def _stored_pair(
    kind: BlockType, x: Tensor, h: Tensor, total: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Float16 scale and offset: the rounded best, and what follows when one of the two is rounded first."""
    least, most = x.amin(-1), x.amax(-1)
    plain = (most - least) / kind.levels[-1], least
    best, best_error = (torch.zeros_like(scale), torch.zeros_like(scale)), (h * x * x).sum(-1)
    for first in ((scale, offset), plain):
        d = _half(first[0])
        sums = measure(kind, x, h, d, first[1])
        for dmin in (first[1], first[1] + sums.f / total):
            now = d, dmin.clamp(-HALF_MAX, HALF_MAX).half().float()
            error = measure(kind, x, h, *now).a
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = tuple(torch.where(better, new, old) for new, old in zip(now, best, strict=True))
    return best


def _integer_pairs(
    kind: BlockType, x: Tensor, h: Tensor, total: Tensor, d: Tensor, dmin: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Sums]:
    """The sub-scale and sub-minimum of the least true error: next to scale / d, each with the minimum that suits it."""
    assert kind.sub_scale is not None
    assert kind.sub_min is not None
    middle = (scale / d).round_()
    best_sub = torch.zeros_like(scale)
    best_low = (-offset / dmin).round_().clamp_(*kind.sub_min)
    best_sums = measure(kind, x, h, best_sub, -dmin * best_low)
    for step in (0, -1, 1):
        sub = (middle + step).clamp_(*kind.sub_scale)
        low = (-offset / dmin).round_().clamp_(*kind.sub_min)
        for _ in range(2):
            sums = measure(kind, x, h, d * sub, -dmin * low)
            better = sums.a < best_sums.a
            best_sub, best_low = torch.where(better, sub, best_sub), torch.where(better, low, best_low)
            best_sums = Sums(*(torch.where(better, new, old) for new, old in zip(sums, best_sums, strict=True)))
            low = (low - sums.f / (total * dmin)).round_().clamp_(*kind.sub_min)
    return best_sub, best_low, best_sums


def _refit(d: Tensor, dmin: Tensor, sub: Tensor, low: Tensor, sums: Sums, total: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares d and dmin of each block for the same integers and codes."""
    block = Sums(
        _per_block(sums.a),
        _per_block(sub * sums.b),
        _per_block(sub * sub * sums.c),
        _per_block(-low * sub * sums.d),
        _per_block(-low * sums.f),
    )
    step, shift, _ = _solve(block, _per_block(low * low * total).clamp_min(1e-30), free=True)
    return _half(d + step), _half(dmin + shift)


# --- powers of two --------------------------------------------------------------------------------------------------


def _power_of_two(kind: BlockType, x: Tensor, h: Tensor) -> Tensor:
    """MXFP4: the best of the powers of two near the range."""
    largest = x.abs().amax(-1)
    _, exponent = torch.frexp(largest)  # largest = 0.5..1 * 2**exponent
    best, best_error = torch.full_like(largest, 0.0), torch.full_like(largest, torch.inf)
    unit = torch.ldexp(torch.ones_like(largest), -exponent.float()).unsqueeze(-1)
    x = x * unit  # products of huge weights overflow, those of tiny ones vanish
    for step in (-3, -2, -4, -5):
        power = (exponent + step).clamp(-128, 126)
        scale = torch.ldexp(unit[..., 0], power)
        error = measure(kind, x, h, scale).a
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, power, best)
    return torch.ldexp(torch.ones_like(largest), best)
