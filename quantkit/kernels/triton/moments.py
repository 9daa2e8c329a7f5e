# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Products over tokens on a GPU from bfloat16 factors with float32 sums; X^T X is half of a full one, being symmetric.

Activations that a model computes in bfloat16 lose nothing by it; float32 ones are rounded to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

_HEIGHT = 256
_WIDTH = 128
_TOKENS = 64
_STAGES = 3
_WIDEST = 8192  # beyond it the tiles in flight share too little of x


@triton.jit
def _add_squares(
    x, sums, n_tokens, width, x_stride, sums_stride, weight,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile (HEIGHT, WIDTH) that reaches below the diagonal, and its mirror image. Programs count along the rows of
    the triangle, HEIGHT / WIDTH tiles more in each."""
    number = tl.program_id(0)
    more = HEIGHT // WIDTH
    row = ((tl.sqrt(8.0 * number.to(tl.float32) / more + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(more * row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where(more * (row + 1) * (row + 2) // 2 <= number, row + 1, row)
    column = number - more * row * (row + 1) // 2
    i, j = row * HEIGHT + tl.arange(0, HEIGHT), column * WIDTH + tl.arange(0, WIDTH)
    tokens = tl.arange(0, TOKENS)
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    left_at = x + tokens.to(tl.int64)[:, None] * x_stride + i[None, :]
    right_at = x + tokens.to(tl.int64)[:, None] * x_stride + j[None, :]
    for first in range(0, n_tokens, TOKENS):
        there = (first + tokens < n_tokens)[:, None]
        left = tl.load(left_at, mask=there & (i < width)[None, :], other=0.0).to(tl.bfloat16)
        right = tl.load(right_at, mask=there & (j < width)[None, :], other=0.0).to(tl.bfloat16)
        total = tl.dot(tl.trans(left), right, total)
        left_at += TOKENS * x_stride
        right_at += TOKENS * x_stride
    inside = (i < width)[:, None] & (j < width)[None, :] & (i[:, None] >= j[None, :])
    at = sums + i.to(tl.int64)[:, None] * sums_stride + j[None, :]
    total = tl.load(at, mask=inside, other=0.0) + total * weight
    tl.store(at, total, mask=inside)
    mirror = sums + j.to(tl.int64)[:, None] * sums_stride + i[None, :]
    tl.store(mirror, tl.trans(total), mask=(i < width)[None, :] & (j[:, None] < i[None, :]))


def add_products_(sums: Tensor, left: Tensor, right: Tensor, weight: float = 1.0) -> None:
    """sums (m, n) float32 += weight * left^T right; left (tokens, m), right (tokens, n), rounded to bfloat16."""
    torch.addmm(sums, left.bfloat16().T, right.bfloat16(), out_dtype=torch.float32, alpha=weight, out=sums)


def add_squares_(sums: Tensor, x: Tensor, weight: float = 1.0) -> None:
    """sums (in, in) float32, symmetric, += weight * x^T x; x (tokens, in) bfloat16, or float32 to be rounded to it."""
    width = x.shape[1]
    if width > _WIDEST:
        half = triton.cdiv(width // 2, _HEIGHT) * _HEIGHT
        below = sums[half:, :half]
        add_squares_(sums[:half, :half], x[:, :half], weight)
        add_squares_(sums[half:, half:], x[:, half:], weight)
        add_products_(below, x[:, half:], x[:, :half], weight)
        sums[:half, half:] = below.T
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = triton.cdiv(width, _HEIGHT)
    with device_of(sums):
        _add_squares[(_HEIGHT // _WIDTH * rows * (rows + 1) // 2,)](
            x, sums, len(x), width, x.stride(0), sums.stride(0), weight,
            HEIGHT=_HEIGHT, WIDTH=_WIDTH, TOKENS=_TOKENS, num_warps=8, num_stages=_STAGES,
        )  # fmt: skip
