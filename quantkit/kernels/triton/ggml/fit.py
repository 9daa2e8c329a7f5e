# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Scales and codes of ggml's block types on a GPU: launches of the searches, and the nearest levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from quantkit.kernels.triton.ggml.offset import search_offset
from quantkit.kernels.triton.ggml.power import search_power
from quantkit.kernels.triton.ggml.symmetric import search_symmetric

_LANES = 128  # groups of a program: four warps
_CODED = 1024  # weights of a program that only codes
_TABLE_START, _TABLE_SIZE = -128, 512


Found = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]
"""d, dmin (B, out, blocks) float32, sub_scale, sub_min (B, out, groups) int16; None what the type has not."""


def fit_blocks(
    weight: Tensor,
    importance: Tensor,
    *,
    block: int,
    group: int,
    levels: tuple[int, ...],
    shares: Sequence[float],
    matters: float,
    sub_scale: tuple[int, int] | None,
    sub_min: tuple[int, int] | None,
    has_offset: bool,
    powers_of_two: bool,
) -> Found:
    """weight (B, out, in), importance (B, in), both float32 and finite -> the scales as stored.

    ``levels``: all values, rising; sizes and limits as in `quantkit.schemes.ggml.types.BlockType`, ``shares`` and
    ``matters`` as in `quantkit.schemes.ggml.measure`.
    """
    n_matrices, out_features, in_features = weight.shape
    weight, importance, n_groups = weight.contiguous(), importance.contiguous(), weight.numel() // group
    d = weight.new_empty(n_matrices, out_features, in_features // block)
    dmin = torch.empty_like(d) if has_offset else None
    integers = n_matrices, out_features, in_features // group if sub_scale else 0
    sub = weight.new_empty(integers, dtype=torch.int16)
    low = torch.empty_like(sub) if sub_min else sub
    if n_groups:
        sizes = n_groups, in_features // group, out_features, matters
        tried = torch.tensor(shares, device=weight.device)
        table = _table(levels, weight.device)
        grid, lanes = (triton.cdiv(n_groups, _LANES),), {"K": group, "N": _LANES, "num_warps": _LANES // 32}
        shape = {"POINTS": len(shares), "GROUPS": block // group, **lanes}
        low_sub, high_sub = sub_scale or (0, 0)
        if powers_of_two:
            with device_of(weight):
                search_power[grid](weight, importance, table, d, *sizes, LOW=levels[0], HIGH=levels[-1], **lanes)
        elif dmin is not None:
            with device_of(weight):
                search_offset[grid](
                    weight, importance, tried, d, dmin, sub, low, *sizes,
                    HIGH=levels[-1], MAX_SUB=high_sub, MAX_LOW=(sub_min or (0, 0))[1], **shape,
                )  # fmt: skip
        else:
            with device_of(weight):
                search_symmetric[grid](
                    weight, importance, tried, table, d, sub, *sizes, LOW=levels[0], HIGH=levels[-1],
                    TABLE=len(table) > 0, MIN_SUB=low_sub, MAX_SUB=high_sub, **shape,
                )  # fmt: skip
    return d, dmin, sub if sub_scale else None, low if sub_min else None


def _uniform(levels: tuple[int, ...]) -> bool:
    return levels == tuple(range(levels[0], levels[-1] + 1))


def _table(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """The level of each half step of `level_of`, empty for levels that are integers in a row."""
    if _uniform(levels):
        return torch.empty(0, dtype=torch.uint8, device=device)
    values = torch.tensor(levels, dtype=torch.float32)
    steps = _TABLE_START + torch.arange(_TABLE_SIZE) / 2
    return values[torch.bucketize(steps, (values[1:] + values[:-1]) / 2)].add(128).to(torch.uint8).to(device)


@triton.jit
def _code(
    weight, scale, offset, bounds, codes, n_weights, K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr, BOUNDS: tl.constexpr, MIRRORED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """weight (n_weights,), scale and offset (n_weights / K,), bounds between BOUNDS + 1 levels, rising: fill codes.
    Codes count levels from the lowest; MIRRORED: from the middle one up, then from it down (sign and magnitude)."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < n_weights
    value = tl.load(weight + place, mask=inside, other=0.0)
    step = tl.load(scale + place // K, mask=inside, other=0.0)
    if OFFSET:
        value -= tl.load(offset + place // K, mask=inside, other=0.0)
    value = value * tl.where(tl.abs(step) > 1e-37, tl.div_rn(1.0, step), 0.0)
    if BOUNDS == 0:
        code = tl.minimum(tl.maximum(value, LOW), HIGH)
        code = (code + 12582912.0) - 12582912.0 - LOW  # 1.5 * 2**23: what stays is rounded, ties to even
    else:
        code = value * 0.0
        for bound in tl.static_range(BOUNDS):
            code += tl.where(value > tl.load(bounds + bound), 1.0, 0.0)
        if MIRRORED:
            code = tl.where(code < BOUNDS // 2, BOUNDS + 1.0 - code, code - BOUNDS // 2)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)


def encode_blocks(
    levels: tuple[int, ...], weight: Tensor, scale: Tensor, offset: Tensor | None, *, mirrored: bool
) -> Tensor:
    """weight (..., in), scale and offset (..., groups), float32 -> codes (..., in) uint8: places of the nearest levels
    among ``levels``, all that there are, rising; ``mirrored``: sign and magnitude."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return codes
    middles = [(low + high) / 2 for low, high in zip(levels, levels[1:], strict=False)]
    bounds = torch.tensor(middles if not _uniform(levels) else [0.0], device=weight.device)
    scale = scale.contiguous()
    with device_of(weight):
        _code[(triton.cdiv(weight.numel(), _CODED),)](
            weight.contiguous(), scale, scale if offset is None else offset.contiguous(),
            bounds, codes, weight.numel(), K=weight.shape[-1] // scale.shape[-1], LOW=float(levels[0]),
            HIGH=float(levels[-1]), OFFSET=offset is not None, BOUNDS=0 if _uniform(levels) else len(middles),
            MIRRORED=mirrored, SIZE=_CODED, num_warps=4,
        )  # fmt: skip
    return codes
