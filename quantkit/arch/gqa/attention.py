"""Grouped-query attention (arXiv 2305.13245) as a `DenseBlock`: the full causal pass over rows.

In: the residual stream x (rows, tokens, hidden). Out, per stage: the normed stream (for q, k and v, which are one input
group), the attention context (for o). Families differ in `GqaShape` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantkit.arch.base import DenseBlock, InputGroup, LinearRows, NormWeight, Stage
from quantkit.arch.ops import linear, rms_norm, rope_rotation, rotate_heads_
from quantkit.arch.rope import Rope

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS = 2**21, 2**26
"""Elements of the queries that attend at once: a few heads at a time go through a CPU's cache."""

QkNorm = Literal["none", "head", "flat"]
"""What queries and keys are normed over before they are rotated: nothing, each head, or all heads together."""


@dataclass(frozen=True, slots=True)
class GqaShape:
    """``n_heads`` queries of ``head_dim`` share ``n_kv_heads`` keys and values. The first ``rope.dim`` dimensions of a
    head are rotated. ``qkv_bias``: q, k and v have biases. ``window``: a query attends to so many keys, itself the last
    of them; None: to all before it. ``sinks``: each head has a logit more in its softmax, which takes weight and gives
    nothing.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope
    norm_eps: float
    qkv_bias: bool = False
    qk_norm: QkNorm = "none"
    window: int | None = None
    sinks: bool = False

    @property
    def softmax_scale(self) -> float:
        """Multiplies the scores."""
        return self.head_dim**-0.5


class GqaNames:
    """The tensor names of the attention in a layer whose names start with ``prefix`` ("model.layers.3.")."""

    def __init__(self, prefix: str) -> None:
        own = f"{prefix}self_attn."
        self.input_norm = f"{prefix}input_layernorm.weight"
        self.q, self.k, self.v, self.o = (f"{own}{name}_proj.weight" for name in "qkvo")
        self.q_bias, self.k_bias, self.v_bias = (f"{own}{name}_proj.bias" for name in "qkv")
        self.q_norm, self.k_norm = f"{own}q_norm.weight", f"{own}k_norm.weight"
        self.sinks = f"{own}sinks"


def attention_block(prefix: str, shape: GqaShape, parts: tuple[str, ...] = ()) -> DenseBlock:
    """Block "attention" of a layer. ``parts``: of q and k, where a format stores them in another order of rows."""
    names = GqaNames(prefix)
    readers = (names.q, names.k, names.v)
    # Values that several heads share cannot absorb the factors of each, and a bias would have to be divided too.
    own_values = shape.n_heads == shape.n_kv_heads and not shape.qkv_bias
    values = LinearRows(names.v, (names.o,)) if own_values else None
    return DenseBlock(
        name="attention",
        stages=(
            Stage(
                (InputGroup((*readers, *parts), NormWeight(names.input_norm, readers)),), partial(_normed, names, shape)
            ),
            Stage((InputGroup((names.o,), values),), partial(_contexts, names, shape)),
        ),
    )


def _normed(names: GqaNames, shape: GqaShape, weights: Weights, x: Tensor) -> tuple[Tensor]:
    """x (rows, tokens, hidden) -> (rows * tokens, hidden)."""
    return (rms_norm(x.flatten(0, 1), weights(names.input_norm), shape.norm_eps),)


def _contexts(names: GqaNames, shape: GqaShape, weights: Weights, x: Tensor) -> tuple[Tensor]:
    """What o reads: (rows * tokens, heads * head_dim), head by head."""
    n_rows, n_tokens, _ = x.shape
    (h,) = _normed(names, shape, weights, x)
    h = h.view(n_rows, n_tokens, -1)
    rotation = rope_rotation(shape.rope, n_tokens, x.device)
    mask = _mask(shape, weights(names.sinks) if shape.sinks else None, n_tokens, x.device)
    context = h.new_empty(n_rows, n_tokens, shape.n_heads, shape.head_dim, dtype=weights(names.v).dtype)
    chunk = DEVICE_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS
    group = shape.n_heads // shape.n_kv_heads
    step = max(1, chunk // (n_tokens * shape.head_dim * group))  # keys of so many heads at once
    row_step = max(1, step // shape.n_kv_heads)
    for row in range(0, n_rows, row_step):
        rows = slice(row, row + row_step)
        q, k, v = _heads(names, shape, weights, h[rows], rotation)
        for head in range(0, shape.n_kv_heads, step):
            shared, own = slice(head, head + step), slice(head * group, (head + step) * group)
            allowed = mask if mask is None or mask.dim() == 2 else mask[own]
            context[rows, :, own] = _attend(q[:, :, own], k[:, :, shared], v[:, :, shared], shape, allowed)
    return (context.view(n_rows * n_tokens, -1),)


def _heads(
    names: GqaNames, shape: GqaShape, weights: Weights, h: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """h (r, t, hidden) -> queries (r, t, heads, head_dim), keys and values (r, t, kv_heads, head_dim)."""
    v = _projected(weights, names.v, names.v_bias if shape.qkv_bias else None, h)
    q, k = (
        _turned(shape, weights, norm, _projected(weights, name, bias if shape.qkv_bias else None, h), rotation)
        for name, bias, norm in ((names.q, names.q_bias, names.q_norm), (names.k, names.k_bias, names.k_norm))
    )
    return q.to(v.dtype), k.to(v.dtype), v.unflatten(-1, (-1, shape.head_dim))


def _projected(weights: Weights, name: str, bias: str | None, h: Tensor) -> Tensor:
    out = linear(h, weights(name))
    return out if bias is None else out + weights(bias).to(out.dtype)


def _turned(shape: GqaShape, weights: Weights, norm: str, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x (r, t, heads * head_dim) -> (r, t, heads, head_dim) normed and rotated."""
    if shape.qk_norm == "flat":
        x = rms_norm(x, weights(norm), shape.norm_eps)
    x = x.unflatten(-1, (-1, shape.head_dim))
    if shape.qk_norm == "head":
        x = rms_norm(x, weights(norm), shape.norm_eps)
    rotate_heads_(x[..., : shape.rope.dim], *rotation, shape.rope.interleaved)
    return x


def _mask(shape: GqaShape, sinks: Tensor | None, n_tokens: int, device: torch.device) -> Tensor | None:
    """What is added to the scores: (tokens, tokens), or (heads, tokens, 1 + tokens) with sinks, whose key is the first;
    None for causal attention to all keys."""
    if sinks is None and (shape.window is None or n_tokens <= shape.window):
        return None
    allowed = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril_()
    if shape.window is not None:
        allowed = allowed.triu_(1 - shape.window)
    added = torch.zeros(n_tokens, n_tokens, device=device).masked_fill_(~allowed, float("-inf"))
    if sinks is None:
        return added
    column = sinks.float().view(-1, 1, 1).expand(-1, n_tokens, 1)
    return torch.cat((column, added.expand(len(sinks), -1, -1)), dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, shape: GqaShape, added: Tensor | None) -> Tensor:
    """Causal softmax attention: q (r, t, heads, dim), k and v (r, t, kv_heads, dim) -> (r, t, heads, dim). ``added``:
    as of `_mask`."""
    group = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(group, dim=2) if group > 1 else part for part in (k, v))
    if shape.sinks:
        k, v = (torch.cat((part.new_zeros(len(part), 1, *part.shape[2:]), part), dim=1) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mask = None if added is None else added.to(q.dtype)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=shape.softmax_scale)
    return out.transpose(1, 2)
