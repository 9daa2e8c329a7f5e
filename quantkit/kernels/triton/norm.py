# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Norms and rotations of a layer's inputs on a GPU: one pass each, where torch takes several over float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

WIDEST = 16384
"""Elements of a row that a program holds at once."""
_PAIRS = 32
_HEADS = 4


@triton.jit
def _rms_norm(x, weight, result, width, eps, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    per_length = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / width + eps)
    normed = values * per_length * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row + columns, normed.to(result.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `quantkit.arch.ops.rms_norm`: x (..., n) of any float dtype, n at most `WIDEST`, weight (n,) -> (..., n) in
    the weight's dtype."""
    x, weight = x.contiguous(), weight.contiguous()
    assert weight.shape == x.shape[-1:], f"a norm of {list(weight.shape)} for {list(x.shape)}"
    result = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    width = x.shape[-1]
    if x.numel():
        columns = triton.next_power_of_2(width)
        with device_of(x):
            _rms_norm[(x.numel() // width,)](
                x, weight, result, width, eps, COLUMNS=columns, num_warps=8 if columns > 2048 else 4
            )
    return result


@triton.jit
def _rotate(
    x, cos, sin, n_tokens, n_heads, token_stride, head_stride, half, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, PAIRS)
    inside = (heads < n_heads)[:, None] & (pairs < half)[None, :]
    at = x + token * token_stride + heads[:, None] * head_stride
    angle = token % n_tokens * half + pairs
    c = tl.load(cos + angle, mask=pairs < half, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=pairs < half, other=0.0)[None, :]
    first_at, second_at = at + pairs[None, :], at + half + pairs[None, :]
    if INTERLEAVED:
        first = tl.load(at + 2 * pairs[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + 2 * pairs[None, :] + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        first = tl.load(first_at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(second_at, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # the results go where other threads have read
    tl.store(first_at, (first * c - second * s).to(x.dtype.element_ty), mask=inside)
    tl.store(second_at, (second * c + first * s).to(x.dtype.element_ty), mask=inside)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """As `quantkit.arch.ops.rotate`, in place: x (rows, tokens, heads, dim), whose rows follow one another and whose
    heads may have any distance, cos and sin (tokens, dim / 2) float32."""
    n_rows, n_tokens, n_heads, dim = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    assert x.stride(3) == 1, f"strides {x.stride()}"
    assert n_rows == 1 or x.stride(0) == n_tokens * x.stride(1), f"strides {x.stride()}"
    assert cos.shape == sin.shape == (n_tokens, dim // 2), f"angles {list(cos.shape)} for {list(x.shape)}"
    with device_of(x):
        _rotate[(n_rows * n_tokens, triton.cdiv(n_heads, _HEADS))](
            x, cos, sin, n_tokens, n_heads, x.stride(1), x.stride(2), dim // 2,
            INTERLEAVED=interleaved, HEADS=_HEADS, PAIRS=max(_PAIRS, triton.next_power_of_2(dim // 2)), num_warps=1,
        )  # fmt: skip
