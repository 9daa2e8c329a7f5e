# pyright: basic, reportMissingImports=false
"""X^T X on a GPU from bfloat16 factors with float32 sums: half of a full product, for the result is symmetric.

Activations that a model computes in bfloat16 lose nothing by it; float32 ones are rounded to it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 128
_TOKENS = 64


@triton.jit
def _add_squares(
    x, sums, n_tokens, width, weight,
    TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal, and its mirror image. Programs count along the rows of the triangle."""
    number = tl.program_id(0)
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    column = number - row * (row + 1) // 2
    i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    tokens = tl.arange(0, TOKENS)
    total = tl.zeros([TILE, TILE], tl.float32)
    left_at = x + tokens.to(tl.int64)[:, None] * width + i[None, :]
    right_at = x + tokens.to(tl.int64)[:, None] * width + j[None, :]
    for first in range(0, n_tokens, TOKENS):
        there = (first + tokens < n_tokens)[:, None]
        left = tl.load(left_at, mask=there & (i < width)[None, :], other=0.0).to(tl.bfloat16)
        right = tl.load(right_at, mask=there & (j < width)[None, :], other=0.0).to(tl.bfloat16)
        total = tl.dot(tl.trans(left), right, total)
        left_at += TOKENS * width
        right_at += TOKENS * width
    inside = (i < width)[:, None] & (j < width)[None, :]
    at = sums + i.to(tl.int64)[:, None] * width + j[None, :]
    total = tl.load(at, mask=inside, other=0.0) + total * weight
    tl.store(at, total, mask=inside)
    mirror = sums + j.to(tl.int64)[:, None] * width + i[None, :]
    tl.store(mirror, tl.trans(total), mask=(j < width)[:, None] & (i < width)[None, :] & (row != column))


def add_squares_(sums: Tensor, x: Tensor, weight: float = 1.0) -> None:
    """sums (in, in) float32, symmetric, += weight * x^T x; x (tokens, in) bfloat16, or float32 to be rounded to it."""
    tiles = triton.cdiv(x.shape[1], _TILE)
    _add_squares[(tiles * (tiles + 1) // 2,)](
        x.contiguous(), sums, len(x), x.shape[1], weight, TILE=_TILE, TOKENS=_TOKENS, num_warps=8, num_stages=4
    )
