# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Latent codes on a GPU, one pass each: what they decode to, and their update with the sums that scales need. Their
twins say what is computed: `quantkit.tuning.latents`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

_TILE = 1024
"""Weights that a program holds at once: whole groups, or a part of one."""


@triton.jit
def _decode(
    index, levels, multiplier, addend, weight, n_groups, size,
    ADDEND: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    real = groups < n_groups
    scale = tl.load(multiplier + row * n_groups + groups, mask=real, other=0.0)[:, None]
    shift = tl.zeros((GROUPS, 1), tl.float32)
    if ADDEND:
        shift = tl.load(addend + row * n_groups + groups, mask=real, other=0.0)[:, None]
    for start in range(0, size, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = real[:, None] & (columns < size)[None, :]
        at = row * n_groups * size + groups[:, None] * size + columns[None, :]
        level = tl.load(levels + tl.load(index + at, mask=inside, other=0).to(tl.int32))
        value = level * scale
        if ADDEND:
            value = value + shift
        tl.store(weight + at, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _update(
    index, offset, levels, multiplier, gradient, of_level, of_gradient, n_groups, size, step, highest,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    real = groups < n_groups
    at_group = row * n_groups + groups
    scale = tl.load(multiplier + at_group, mask=real, other=0.0)[:, None]
    weighted = tl.zeros((GROUPS,), tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, size, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = real[:, None] & (columns < size)[None, :]
        at = row * n_groups * size + groups[:, None] * size + columns[None, :]
        code = tl.load(index + at, mask=inside, other=0).to(tl.int32)
        given = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        weighted += tl.sum(given * tl.load(levels + code), 1)
        total += tl.sum(given, 1)
        # The product of two signs, not that of two numbers, which may be too small for float32.
        down = (given > 0) == (scale > 0)
        move = tl.where((given == 0) | (scale == 0), 0, tl.where(down, -step, step))
        latent = code * 65536 + tl.load(offset + at, mask=inside, other=0).to(tl.int32) + move
        latent = tl.minimum(tl.maximum(latent, -32768), highest) + 32768
        tl.store(index + at, (latent >> 16).to(tl.uint8), mask=inside)
        tl.store(offset + at, ((latent & 65535) - 32768).to(tl.int16), mask=inside)
    tl.store(of_level + at_group, weighted, mask=real)
    tl.store(of_gradient + at_group, total, mask=real)


def _tile(n_groups: int, size: int) -> tuple[int, int, int]:
    """Groups and columns of a program's tile, and programs of a row."""
    columns = min(_TILE, triton.next_power_of_2(size))
    groups = max(1, min(_TILE // columns, triton.next_power_of_2(n_groups)))
    return groups, columns, triton.cdiv(n_groups, groups)


def decode(index: Tensor, levels: Tensor, multiplier: Tensor, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `quantkit.tuning.latents.decode`."""
    n_groups, in_features = multiplier.shape[-1], index.shape[-1]
    weight = torch.empty(index.shape, dtype=dtype, device=index.device)
    groups, columns, programs = _tile(n_groups, in_features // n_groups)
    if index.numel():
        with device_of(index):
            _decode[(index.numel() // in_features, programs)](
                index.contiguous(), levels, multiplier.contiguous(),
                multiplier if addend is None else addend.contiguous(), weight, n_groups, in_features // n_groups,
                ADDEND=addend is not None, GROUPS=groups, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return weight


def update(
    index: Tensor, offset: Tensor, levels: Tensor, multiplier: Tensor, gradient: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """See `quantkit.tuning.latents.update_in_torch`: index and offset, contiguous, change in place."""
    assert index.is_contiguous(), "changed in place"
    assert offset.is_contiguous(), "changed in place"
    n_groups, in_features = multiplier.shape[-1], index.shape[-1]
    of_level, of_gradient = (torch.empty(multiplier.shape, device=index.device) for _ in range(2))
    groups, columns, programs = _tile(n_groups, in_features // n_groups)
    if index.numel():
        with device_of(index):
            _update[(index.numel() // in_features, programs)](
                index, offset, levels, multiplier.contiguous(), gradient.contiguous(), of_level, of_gradient,
                n_groups, in_features // n_groups, step, (len(levels) - 1) * 65536 + 32767,
                GROUPS=groups, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return of_level, of_gradient
