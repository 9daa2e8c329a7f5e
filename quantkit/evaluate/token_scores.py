"""Losses, KL divergence and first choices of candidates against their reference, from the hidden states after the last
layer; the vocabulary in blocks, so that no token's logits exist as a whole.

For each position, in one pass over the blocks:

    KL(p || q) = sum_v p_v (l_v - m_v) - (lse l - lse m)        l, m: reference and candidate logits

sum_v p_v (l_v - m_v) is carried with a running maximum of l, as in online softmax. Sums are float64 over float32
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.arch.base import ModelArch
from quantkit.calibrate.chunk_sizes import POSITIONS, VOCAB_BLOCK
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import row_batches
from quantkit.evaluate.finite import check_losses

if TYPE_CHECKING:
    from quantkit.arch.base import Weights


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One value for each position that predicts a token: (n_rows, scored). nll in nats of reference and candidate,
    kld in nats, same_top bool: both put the same token first."""

    reference_nll: Tensor
    candidate_nll: Tensor
    kld: Tensor
    same_top: Tensor

    def rows(self, chosen: Sequence[int]) -> TokenScores:
        """The scores of some rows."""
        index = torch.tensor(list(chosen), dtype=torch.int64)
        return TokenScores(self.reference_nll[index], self.candidate_nll[index], self.kld[index], self.same_top[index])


@dataclass(frozen=True, slots=True)
class Head:
    """A model's hidden states after its last layer, and what computes logits of them. Fields as of `compare.Model`;
    ``x``: hidden states."""

    arch: ModelArch
    weights: Weights
    head_rows: Callable[[int, int], Tensor]
    x: RowStore
    device: torch.device
    name: str

    def final(self, start: int, stop: int, first: int) -> Tensor:
        """Inputs of the output matrix at the scored positions of rows [start, stop): (n, hidden)."""
        x = self.x.read(start, stop)[:, first:-1].reshape(-1, self.x.width).to(self.device)
        return self.arch.final_hidden(self.weights, x)

    def check(self, losses: Tensor, row: int, first: int) -> None:
        """Raise `EvaluationError` if one of the losses (rows, scored) is not finite; they begin at ``row`` and at
        position ``first``."""
        check_losses(self.name, self.arch, self.weights, losses, (row, first))


def token_scores(heads: Sequence[Head], tokens: Tensor, first: int = 0) -> list[TokenScores]:
    """Scores of all but the first head against the first. tokens (n_rows, length) int64; position i predicts token
    i + 1, scored from position ``first`` on. Raises `EvaluationError` for a loss that is not finite."""
    scored = tokens.shape[1] - 1 - first
    targets = tokens[:, first + 1 :].flatten().to(heads[0].device)
    softmaxes = [OnlineSoftmax(targets) for _ in heads]
    moved = [torch.zeros(len(targets), dtype=torch.float64, device=targets.device) for _ in heads[1:]]
    vocab_size = heads[0].arch.vocab_size
    for token in range(0, vocab_size, VOCAB_BLOCK):
        blocks = [head.head_rows(token, min(token + VOCAB_BLOCK, vocab_size)) for head in heads]
        for start, stop in row_batches(heads[0].x):
            inputs = [head.final(start, stop, first) for head in heads]
            for at in range(0, len(inputs[0]), POSITIONS):
                part = slice(at, min(at + POSITIONS, len(inputs[0])))
                span = slice(start * scored + part.start, start * scored + part.stop)
                logits = (linear(x[part], block) for x, block in zip(inputs, blocks, strict=True))
                reference = next(logits)
                weights, factor = softmaxes[0].add(span, token, reference)
                for number, candidate in enumerate(logits):
                    softmaxes[number + 1].add(span, token, candidate)
                    difference = (weights * (reference - candidate)).sum(-1, dtype=torch.float64)
                    moved[number][span] = moved[number][span] * factor + difference
    for head, softmax in zip(heads, softmaxes, strict=True):
        head.check(softmax.nll().view(-1, scored), 0, first)
    found = [_finish(softmaxes[0], *pair) for pair in zip(softmaxes[1:], moved, strict=True)]
    return [TokenScores(*(column.view(-1, scored).cpu() for column in columns)) for columns in found]


class OnlineSoftmax:
    """Running log-sum-exp of each position's logits, block of the vocabulary by block. targets (n,) int64."""

    def __init__(self, targets: Tensor) -> None:
        n, device = len(targets), targets.device
        self.targets = targets
        self.top = torch.full((n,), -torch.inf, device=device)
        self.top_token = torch.zeros(n, dtype=torch.int64, device=device)
        self.total = torch.zeros(n, dtype=torch.float64, device=device)
        self.target = torch.zeros(n, device=device)

    def add(self, span: slice, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (m, block), of the positions ``span`` and of tokens from ``first`` on -> (exp(logits - new top)
        (m, block), factor for sums so far (m,))."""
        top, token = logits.max(-1)
        old = self.top[span]
        better = top > old
        new = torch.where(better, top, old)
        self.top_token[span] = torch.where(better, token + first, self.top_token[span])
        factor = (old - new).exp().double()
        self.top[span] = new  # after its last use: ``old`` is a view of it
        weights = (logits - new.unsqueeze(-1)).exp_()
        self.total[span] = self.total[span] * factor + weights.sum(-1, dtype=torch.float64)
        place = self.targets[span] - first
        own = logits.gather(-1, place.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
        self.target[span] = torch.where((place >= 0) & (place < logits.shape[1]), own, self.target[span])
        return weights, factor

    def log_sum(self) -> Tensor:
        """(n,) float64."""
        return self.total.log() + self.top.double()

    def nll(self) -> Tensor:
        """Loss of the target, (n,) float64."""
        return self.log_sum() - self.target.double()


def _finish(reference: OnlineSoftmax, candidate: OnlineSoftmax, moved: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll of both, kld, same top: (n,) each."""
    kld = moved / reference.total - (reference.log_sum() - candidate.log_sum())
    return reference.nll(), candidate.nll(), kld.clamp_min_(0), reference.top_token == candidate.top_token
