"""Perplexity and KL divergence of a candidate against its reference, both streamed side by side through the same text.

Weights of one layer (of one expert) at a time for each; the vocabulary in blocks, so that no token's logits exist as a
whole. For each predicting position, in one pass over the blocks:

    KL(p || q) = sum_v p_v (l_v - m_v) - (lse l - lse m)        l, m: reference and candidate logits

sum_v p_v (l_v - m_v) is carried with a running maximum of l, as in online softmax. Sums are float64 over float32
logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.arch.base import ModelArch
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import embed, forward_layer, row_batches

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

VOCAB_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to run: float32 weights by name, and rows of the two vocabulary matrices.

    ``embed_rows(ids)``: ids (n,) int64 -> (n, hidden); ``head_rows(start, stop)`` -> (stop - start, hidden), all
    float32. ``forget()``: no weight asked for so far is needed again soon.
    """

    weights: Weights
    embed_rows: Callable[[Tensor], Tensor]
    head_rows: Callable[[int, int], Tensor]
    device: torch.device = torch.device("cpu")
    forget: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One value for each position that predicts a token: (n_rows, length - 1). nll in nats of reference and candidate,
    kld in nats, same_top bool: both put the same token first."""

    reference_nll: Tensor
    candidate_nll: Tensor
    kld: Tensor
    same_top: Tensor


def compare(
    arch: ModelArch,
    reference: Model,
    candidate: Model,
    tokens: Tensor,
    new_rows: Callable[[int, int, int], RowStore],
    on_layer: Callable[[int], None] = lambda layer: None,
) -> TokenScores:
    """Score both models on tokens (n_rows, length) int64. ``new_rows(n_rows, length, width)`` makes a store for hidden
    states."""
    models = (reference, candidate)
    n_rows, length = tokens.shape
    stores = [new_rows(n_rows, length, arch.hidden_size) for _ in models]
    scratch = new_rows(n_rows, length, arch.hidden_size)
    for model, store in zip(models, stores, strict=True):
        embed(model.embed_rows, tokens, store)
    for layer in range(arch.n_layers):
        for model, store in zip(models, stores, strict=True):
            forward_layer(arch.sublayers(layer), model.weights, store, scratch, model.device)
            model.forget()
        on_layer(layer)
    scores = _score(arch, models, stores, tokens)
    for store in (*stores, scratch):
        store.close()
    return scores


class _Softmax:
    """Running log-sum-exp of each position's logits, block of the vocabulary by block."""

    def __init__(self, n: int) -> None:
        self.top = torch.full((n,), -torch.inf)
        self.top_token = torch.zeros(n, dtype=torch.int64)
        self.total = torch.zeros(n, dtype=torch.float64)
        self.target = torch.zeros(n)

    def add(self, first: int, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """logits (n, block) of tokens from ``first`` on -> (exp(logits - new top) (n, block), factor for sums so far
        (n,))."""
        top, token = logits.max(-1)
        better = top > self.top
        self.top_token = torch.where(better, token + first, self.top_token)
        new_top = torch.where(better, top, self.top)
        factor = (self.top - new_top).exp().double()
        self.top = new_top
        weights = (logits - new_top.unsqueeze(-1)).exp()
        self.total = self.total * factor + weights.sum(-1, dtype=torch.float64)
        inside = (targets >= first) & (targets < first + logits.shape[1])
        own = logits.gather(-1, (targets - first).clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
        self.target = torch.where(inside, own, self.target)
        return weights, factor

    def log_sum(self) -> Tensor:
        """(n,) float64."""
        return self.total.log() + self.top.double()


def _score(arch: ModelArch, models: tuple[Model, Model], stores: list[RowStore], tokens: Tensor) -> TokenScores:
    batches = list(row_batches(stores[0]))
    targets = [tokens[start:stop, 1:].flatten() for start, stop in batches]
    softmaxes = [(_Softmax(len(t)), _Softmax(len(t))) for t in targets]
    differences = [torch.zeros(len(t), dtype=torch.float64) for t in targets]
    for first in range(0, arch.vocab_size, VOCAB_BLOCK):
        heads = [model.head_rows(first, min(first + VOCAB_BLOCK, arch.vocab_size)) for model in models]
        for number, (start, stop) in enumerate(batches):
            logits: list[Tensor] = []
            for model, store, head in zip(models, stores, heads, strict=True):
                x = store.read(start, stop)[:, :-1].reshape(-1, arch.hidden_size).to(head.device)
                logits.append(linear(arch.final_hidden(model.weights, x), head).cpu())
            reference, candidate = softmaxes[number]
            weights, factor = reference.add(first, logits[0], targets[number])
            candidate.add(first, logits[1], targets[number])
            moved = (weights * (logits[0] - logits[1])).sum(-1, dtype=torch.float64)
            differences[number] = differences[number] * factor + moved
    parts = [_finish(*pair, difference) for pair, difference in zip(softmaxes, differences, strict=True)]
    columns = [torch.cat(column).view(len(tokens), -1) for column in zip(*parts, strict=True)]
    return TokenScores(*columns)


def _finish(reference: _Softmax, candidate: _Softmax, difference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll of both, kld, same top: (n,) each."""
    kld = difference / reference.total - (reference.log_sum() - candidate.log_sum())
    return (
        reference.log_sum() - reference.target.double(),
        candidate.log_sum() - candidate.target.double(),
        kld.clamp_min_(0),
        reference.top_token == candidate.top_token,
    )
