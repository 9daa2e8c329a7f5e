"""The lightning indexer of sparse attention (report of DeepSeek V3.2, section 2.1): which keys a query attends to.

Until a sequence has more than ``top_k`` tokens it takes them all, and attention is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from quantkit.arch.ops import linear, rotate

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

NORM_EPS = 1e-6
SCORE_ELEMENTS = 2**26
"""Scores of heads, queries and keys that exist at once."""


@dataclass(frozen=True, slots=True)
class Indexer:
    """``top_k`` keys are taken by the scores of ``n_heads`` heads of ``head_dim``, the first dimensions of which are
    rotated, in pairs of neighbours if ``interleaved``."""

    n_heads: int
    head_dim: int
    top_k: int
    interleaved: bool


class IndexerNames:
    """The tensor names of one indexer."""

    def __init__(self, prefix: str) -> None:
        self.queries, self.keys, self.head_weights, self.key_norm, self.key_bias = (
            f"{prefix}self_attn.indexer.{name}"
            for name in ("wq_b.weight", "wk.weight", "weights_proj.weight", "k_norm.weight", "k_norm.bias")
        )


@torch.no_grad()
def chosen_keys(
    indexer: Indexer, names: IndexerNames, weights: Weights, h: Tensor, latent: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """h (rows, tokens, hidden) normed, latent (rows, tokens, q_lora_rank) normed -> (rows, 1, tokens, tokens) bool,
    True where a query (third dimension) attends to a key. A choice: no gradient passes."""
    n_tokens = h.shape[1]
    queries = linear(latent, weights(names.queries)).unflatten(-1, (indexer.n_heads, indexer.head_dim)).float()
    keys = linear(h, weights(names.keys)).float()
    keys = layer_norm(
        keys, (indexer.head_dim,), weights(names.key_norm).float(), weights(names.key_bias).float(), NORM_EPS
    )
    cos, sin = rotation
    queries = _rotated(queries, cos[:, None], sin[:, None], indexer.interleaved)
    keys = _rotated(keys, cos, sin, indexer.interleaved)
    per_head = linear(h, weights(names.head_weights)).float() * (indexer.n_heads * indexer.head_dim) ** -0.5
    causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=h.device).tril_()
    chosen = torch.zeros(len(h), n_tokens, n_tokens, dtype=torch.bool, device=h.device)
    step = max(1, SCORE_ELEMENTS // (indexer.n_heads * n_tokens))
    for row in range(len(h)):
        for start in range(0, n_tokens, step):
            part = slice(start, start + step)
            scores = (queries[row, part] @ keys[row].mT).relu_()  # (queries, heads, keys)
            scores = (per_head[row, part].unsqueeze(1) @ scores).squeeze(1)
            best = scores.masked_fill_(~causal[part], float("-inf")).topk(indexer.top_k, dim=-1).indices
            chosen[row, part] = chosen[row, part].scatter_(-1, best, True)
    return (chosen & causal).unsqueeze(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first dimensions rotated: the order in which they leave is the same for queries and keys."""
    n = 2 * cos.shape[-1]
    return torch.cat((rotate(x[..., :n], cos, sin, interleaved), x[..., n:]), dim=-1)
