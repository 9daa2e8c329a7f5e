"""Multi-head latent attention (arXiv 2405.04434, section 2.1) as a `DenseBlock`: the full causal pass over rows.

In: the residual stream x (rows, tokens, hidden). Out, per stage: the normed stream (for q_a and kv_a), the two normed
latents (for q_b and kv_b), the heads' queries (for the key part of kv_b, where a format stores it alone), the
attention context (for o_proj). Keys and values of all heads never exist at once: rows and heads go in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from quantkit.arch.base import DenseBlock, InputGroup, LinearRows, NormWeight, Stage
from quantkit.arch.indexer import Indexer, IndexerNames, chosen_keys
from quantkit.arch.ops import linear, rms_norm, rope_rotation, rotate, rotate_heads_
from quantkit.arch.rope import Rope

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS = 2**21, 2**26
"""Elements of the queries of one chunk: DeepSeek V3 at 2048 tokens then goes 5 heads at a time through a CPU's cache,
and all heads of a row on a GPU."""


@dataclass(frozen=True, slots=True)
class MlaShape:
    """``q_lora``: queries come through a latent (q_a, q_b), else from one q_proj. ``indexer``: chooses the keys that a
    query attends to; None: all of them.

    A head's query and key are ``nope_dim`` dimensions without position, then ``rope.dim`` rotated ones.
    """

    n_heads: int
    q_lora: bool
    kv_lora_rank: int
    nope_dim: int
    v_dim: int
    rope: Rope
    norm_eps: float
    latent_eps: float
    indexer: Indexer | None = None

    @property
    def qk_dim(self) -> int:
        """Width of one query or key head."""
        return self.nope_dim + self.rope.dim

    @property
    def softmax_scale(self) -> float:
        """Multiplies the scores."""
        return self.qk_dim**-0.5 * self.rope.softmax_factor


def attention_block(prefix: str, shape: MlaShape) -> DenseBlock:
    """Block "attention" of the layer whose names start with ``prefix`` ("model.layers.3.")."""
    names = _Names(prefix)
    first = (names.q_a if shape.q_lora else names.q, names.kv_a)
    kv_norm = NormWeight(names.kv_norm, (names.kv_b,))
    latents = (InputGroup((names.kv_b, f"{names.kv_b}:v"), kv_norm),)
    readers = first
    if shape.q_lora:
        queries = (names.q_b,)
        if shape.indexer is not None:
            queries = (names.q_b, names.indexer.queries)
            readers = (*first, names.indexer.keys, names.indexer.head_weights)
        latents = (InputGroup(queries, NormWeight(names.q_norm, queries)), *latents)
    values = LinearRows(names.kv_b, (names.o,), ValueRows(shape.n_heads, shape.nope_dim))
    return DenseBlock(
        name="attention",
        stages=(
            Stage((InputGroup(first, NormWeight(names.input_norm, readers)),), partial(_normed, names, shape)),
            Stage(latents, partial(_latents, names, shape)),
            Stage((InputGroup((f"{names.kv_b}:k",)),), partial(_head_queries, names, shape)),
            Stage((InputGroup((names.o,), values),), partial(_contexts, names, shape)),
        ),
    )


@dataclass(frozen=True, slots=True)
class ValueRows:
    """The rows of kv_b that make the values: of each head those after the first ``nope_dim``."""

    n_heads: int
    nope_dim: int

    def __call__(self, factors: Tensor) -> Tensor:
        """factors (heads * v_dim,) of the values -> (heads * (nope_dim + v_dim),) of kv_b's rows, 1 for the keys."""
        values = factors.view(self.n_heads, -1)
        return torch.cat((values.new_ones(self.n_heads, self.nope_dim), values), dim=1).flatten()


class _Names:
    """The tensor names of one attention."""

    def __init__(self, prefix: str) -> None:
        def name(linear: str) -> str:
            return f"{prefix}self_attn.{linear}.weight"

        self.input_norm = f"{prefix}input_layernorm.weight"
        self.q, self.q_a, self.q_norm, self.q_b = map(name, ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj"))
        self.kv_a, self.kv_norm, self.kv_b = map(name, ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
        self.o = name("o_proj")
        self.indexer = IndexerNames(prefix)


def _normed(names: _Names, shape: MlaShape, weights: Weights, x: Tensor) -> tuple[Tensor]:
    """x (rows, tokens, hidden) -> (rows * tokens, hidden)."""
    return (rms_norm(x.flatten(0, 1), weights(names.input_norm), shape.norm_eps),)


def _latents(names: _Names, shape: MlaShape, weights: Weights, x: Tensor) -> tuple[Tensor, ...]:
    """The normed query latent, if there is one, and the normed key-value latent, each (rows * tokens, rank)."""
    (h,) = _normed(names, shape, weights, x)
    kv, _ = _key_value_latent(names, shape, weights, h)
    return (_query_latent(names, shape, weights, h), kv) if shape.q_lora else (kv,)


def _head_queries(names: _Names, shape: MlaShape, weights: Weights, x: Tensor) -> tuple[Tensor]:
    """The part of each head's queries without position, (heads, rows * tokens, nope)."""
    (h,) = _normed(names, shape, weights, x)
    latent = _query_latent(names, shape, weights, h)
    weight = weights(names.q_b if shape.q_lora else names.q).view(shape.n_heads, shape.qk_dim, -1)
    return (latent.to(weight.dtype) @ weight[:, : shape.nope_dim].mT,)


def _query_latent(names: _Names, shape: MlaShape, weights: Weights, h: Tensor) -> Tensor:
    """h (n, hidden) -> what the query projection reads: (n, q_lora_rank), or h itself."""
    if not shape.q_lora:
        return h
    return rms_norm(linear(h, weights(names.q_a)), weights(names.q_norm), shape.latent_eps)


def _key_value_latent(names: _Names, shape: MlaShape, weights: Weights, h: Tensor) -> tuple[Tensor, Tensor]:
    """h (n, hidden) -> normed latent (n, kv_lora_rank), and the key part to be rotated (n, rope.dim), for all heads."""
    kv, k_rope = linear(h, weights(names.kv_a)).split((shape.kv_lora_rank, shape.rope.dim), dim=-1)
    return rms_norm(kv, weights(names.kv_norm), shape.latent_eps), k_rope


def _contexts(names: _Names, shape: MlaShape, weights: Weights, x: Tensor) -> tuple[Tensor]:
    """What o_proj reads: (rows * tokens, heads * v_dim), head by head."""
    n_rows, n_tokens, _ = x.shape
    (h,) = _normed(names, shape, weights, x)
    q_latent = _query_latent(names, shape, weights, h).view(n_rows, n_tokens, -1)
    kv_latent, k_rope = _key_value_latent(names, shape, weights, h)
    kv_latent = kv_latent.view(n_rows, n_tokens, -1)
    rotation = rope_rotation(shape.rope, n_tokens, x.device)
    chosen = None
    if shape.indexer is not None and n_tokens > shape.indexer.top_k:
        normed = h.view(n_rows, n_tokens, -1)
        chosen = chosen_keys(shape.indexer, names.indexer, weights, normed, q_latent, rotation)
    del h
    k_rope = rotate(k_rope.view(n_rows, n_tokens, -1), *rotation, shape.rope.interleaved)
    q_weight = weights(names.q_b if shape.q_lora else names.q).view(shape.n_heads, shape.qk_dim, -1)
    kv_weight = weights(names.kv_b).view(shape.n_heads, shape.nope_dim + shape.v_dim, -1)

    context = x.new_empty(n_rows, n_tokens, shape.n_heads, shape.v_dim, dtype=kv_weight.dtype)
    head_size = n_tokens * shape.qk_dim
    chunk = DEVICE_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS
    head_step = min(shape.n_heads, max(1, chunk // head_size))
    row_step = max(1, chunk // (head_size * head_step))
    for row in range(0, n_rows, row_step):
        rows = slice(row, row + row_step)
        for head in range(0, shape.n_heads, head_step):
            heads = slice(head, head + head_step)
            queries = _queries(shape, q_latent[rows], q_weight[heads], rotation).to(context.dtype)
            keys, values = _keys_and_values(shape, kv_latent[rows], k_rope[rows], kv_weight[heads])
            allowed = None if chosen is None else chosen[rows]
            context[rows, :, heads] = _attend(queries, keys, values, shape.softmax_scale, allowed)
    return (context.view(n_rows * n_tokens, -1),)


def _queries(shape: MlaShape, latent: Tensor, weight: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """latent (r, t, n), weight (heads, qk_dim, n) -> rotated queries (r, t, heads, qk_dim)."""
    queries = linear(latent, weight.flatten(0, 1)).unflatten(-1, (-1, shape.qk_dim))
    rotate_heads_(queries[..., shape.nope_dim :], *rotation, shape.rope.interleaved)
    return queries


def _keys_and_values(shape: MlaShape, latent: Tensor, k_rope: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """latent (r, t, n), rotated k_rope (r, t, rope.dim), weight (heads, nope + v, n) -> keys and values.

    Keys (r, t, heads, qk_dim), values (r, t, heads, v_dim).
    """
    both = linear(latent, weight.flatten(0, 1)).unflatten(-1, (-1, shape.nope_dim + shape.v_dim))
    keys = both.new_empty(*both.shape[:-1], shape.qk_dim)
    keys[..., : shape.nope_dim] = both[..., : shape.nope_dim]
    keys[..., shape.nope_dim :] = k_rope[:, :, None]
    return keys, both[..., shape.nope_dim :]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """Causal softmax attention of each head: (r, t, heads, dims) -> (r, t, heads, v_dim). ``allowed`` (r, 1, t, t): the
    keys of each query, None for all before it."""
    qk_dim, v_dim = queries.shape[-1], values.shape[-1]
    # Equal widths take torch's fused kernel, which never holds the (tokens, tokens) scores; zeros change no sum.
    width = max(qk_dim, v_dim)
    q, k, v = (_widened(part, width).transpose(1, 2) for part in (queries, keys, values))
    attended = scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale)
    return attended[..., :v_dim].transpose(1, 2)


def _widened(part: Tensor, width: int) -> Tensor:
    """(..., n) with zeros behind up to (..., width); itself if it has that width, which `pad` would copy."""
    missing = width - part.shape[-1]
    return pad(part, (0, missing)) if missing else part
