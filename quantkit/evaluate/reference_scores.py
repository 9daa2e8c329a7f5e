"""From logits to the statistics of a reference, and from the statistics to scores of candidates.

Of each position the reference's T most likely tokens are kept one by one, all others as one bucket. A candidate's KL
divergence from p over these T + 1 events is

    sum_top p_v (log p_v - log q_v) + P (log P - log Q)        P, Q: probability of all other tokens

By the log sum inequality that is at most the divergence over the whole vocabulary: a lower bound, exact where p and q
are in proportion outside of the top. Losses and first choices are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.arch.base import ExpertBlock, ModelArch
from quantkit.calibrate.chunk_sizes import POSITIONS, SCORED_GROUP, VOCAB_BLOCK
from quantkit.evaluate.compare import (
    Comparison,
    LayerScore,
    Model,
    NewRows,
    agreement,
    all_drafts,
    same_experts,
    start_streams,
)
from quantkit.evaluate.reference_file import Positions, ReferenceStatistics, ReferenceWriter
from quantkit.evaluate.token_scores import Head, OnlineSoftmax, TokenScores


def _groups(n_windows: int, scored: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the windows of each group, at least one."""
    step = max(1, SCORED_GROUP // scored)
    for start in range(0, n_windows, step):
        yield start, min(start + step, n_windows)


def _parts(n: int) -> Iterator[slice]:
    yield from (slice(at, min(at + POSITIONS, n)) for at in range(0, n, POSITIONS))


# ------------------------------------------------------------------------------------------------------------- writing


class FileRecorder:
    """What `compare_all` hands over of the reference, on its way into a file."""

    def __init__(self, writer: ReferenceWriter) -> None:
        self._writer = writer

    def routings(self, layer: int, routings: Sequence[Tensor]) -> None:
        """Experts chosen in a layer, see `ReferenceWriter.routings`."""
        self._writer.routings(layer, routings)

    def logits(self, head: Head, tokens: Tensor, first: int) -> None:
        """Everything after the last layer. tokens (n_rows, length); scored from position ``first`` on."""
        scored = self._writer.scored
        for start, stop in _groups(len(tokens), scored):
            inputs = head.final(start, stop, first)
            targets = tokens[start:stop, first + 1 :].flatten().to(inputs.device)
            found = _top(head, inputs, targets, self._writer.top)
            head.check(found.target_nll.view(-1, scored), start, first)
            self._writer.positions(start * scored, found)


def _top(head: Head, inputs: Tensor, targets: Tensor, n_top: int) -> Positions:
    """inputs (n, hidden) of the output matrix, targets (n,)."""
    n, device = len(inputs), inputs.device
    softmax = OnlineSoftmax(targets)
    top = torch.full((n, n_top), -torch.inf, device=device)
    tokens = torch.zeros((n, n_top), dtype=torch.int32, device=device)
    rest = torch.zeros(n, dtype=torch.float64, device=device)
    for token in range(0, head.arch.vocab_size, VOCAB_BLOCK):
        block = head.head_rows(token, min(token + VOCAB_BLOCK, head.arch.vocab_size))
        for span in _parts(n):
            logits = linear(inputs[span], block)
            _, factor = softmax.add(span, token, logits)
            both = torch.cat((top[span], logits), 1)
            best, place = both.topk(n_top, 1)
            # Summed without the best, and not as a difference: the rest may be tiny.
            others = (both - softmax.top[span].unsqueeze(-1)).exp_().scatter_(1, place, 0)
            rest[span] = rest[span] * factor + others.sum(-1, dtype=torch.float64)
            old = tokens[span].gather(1, place.clamp(max=n_top - 1))
            tokens[span] = torch.where(place < n_top, old, (place - n_top + token).int())
            top[span] = best
    return Positions(tokens, top, softmax.log_sum(), rest / softmax.total, softmax.nll(), softmax.top_token)


# ------------------------------------------------------------------------------------------------------------- scoring


def compare_recorded(
    arch: ModelArch,
    reference: ReferenceStatistics,
    candidates: Sequence[Model],
    new_rows: NewRows,
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[Comparison]:
    """Score candidates against a reference that is not there: as `compare_all`, but hidden errors are NaN, and KLD is
    the lower bound described above."""
    tokens = reference.tokens
    streams, scratch = start_streams(arch, candidates, tokens, new_rows)
    layers: list[list[LayerScore]] = [[] for _ in candidates]
    for layer in range(arch.n_layers):
        blocks = [block for sublayer in arch.sublayers(layer) for block in sublayer if isinstance(block, ExpertBlock)]
        expected = reference.routings(layer, [block.n_experts for block in blocks])
        for found, stream in zip(layers, streams, strict=True):
            score = _layer_score(blocks, layer, expected, stream.forward(layer, scratch))
            found.append(score if same_experts(arch, stream.arch) else replace(score, router_agreement=None))
        on_layer(layer)
    scores = _token_scores([stream.head() for stream in streams], reference)
    drafts = all_drafts(None, streams, tokens, scratch, tokens.shape[1] - 1 - reference.scored)
    for store in (*(stream.x for stream in streams), scratch):
        store.close()
    return [Comparison(found, tuple(own), *more) for found, own, *more in zip(scores, layers, drafts, strict=True)]


def _layer_score(
    blocks: Sequence[ExpertBlock], layer: int, expected: Sequence[Tensor], found: Sequence[Tensor]
) -> LayerScore:
    """``blocks`` of routed experts, and which of them the reference and a candidate chose."""
    loads = None
    if len(blocks) == len(expected) == 1:
        loads = tuple(torch.bincount(expected[0].flatten(), minlength=blocks[0].n_experts).tolist())
    return LayerScore(layer, torch.nan, agreement(expected, [indices.cpu() for indices in found]), expert_tokens=loads)


def _token_scores(heads: Sequence[Head], reference: ReferenceStatistics) -> list[TokenScores]:
    n_windows, context = reference.tokens.shape
    scored = reference.scored
    first = context - 1 - scored
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in heads]
    for start, stop in _groups(n_windows, scored):
        known = reference.positions(start * scored, stop * scored)
        targets = reference.tokens[start:stop, first + 1 :].flatten()
        for own, head in zip(parts, heads, strict=True):
            scores = _scores(head, head.final(start, stop, first), targets, known)
            head.check(scores[1].view(-1, scored), start, first)
            own.append(scores)
    columns = ([torch.cat(column).view(-1, scored) for column in zip(*own, strict=True)] for own in parts)
    return [TokenScores(*own) for own in columns]


def _scores(head: Head, inputs: Tensor, targets: Tensor, known: Positions) -> tuple[Tensor, ...]:
    """nll of both, kld, same top of some positions: (n,) each, on the CPU."""
    n, device = len(inputs), inputs.device
    softmax = OnlineSoftmax(targets.to(device))
    logits_of_top = torch.zeros_like(known.top_logits, device=device)
    rest = torch.zeros(n, dtype=torch.float64, device=device)
    top_tokens = known.top_tokens.to(device)
    for token in range(0, head.arch.vocab_size, VOCAB_BLOCK):
        block = head.head_rows(token, min(token + VOCAB_BLOCK, head.arch.vocab_size))
        width = len(block)
        for span in _parts(n):
            logits = linear(inputs[span], block)
            others, factor = softmax.add(span, token, logits)
            place = top_tokens[span] - token
            here = (place >= 0) & (place < width)
            own = logits.gather(1, place.clamp(0, width - 1))
            logits_of_top[span] = torch.where(here, own, logits_of_top[span])
            taken = torch.zeros((len(logits), width + 1), dtype=torch.bool, device=device)
            taken.scatter_(1, torch.where(here, place, width), value=True)  # one column for what is not in this block
            others.masked_fill_(taken[:, :width], 0)
            rest[span] = rest[span] * factor + others.sum(-1, dtype=torch.float64)
    log_q = (logits_of_top.double() - softmax.log_sum().unsqueeze(-1)).cpu()
    log_p = known.top_logits.double() - known.log_sum.unsqueeze(-1)
    kld = (log_p.exp() * (log_p - log_q)).sum(-1) + _bucket(known.rest, (rest / softmax.total).cpu())
    same = softmax.top_token.cpu() == known.first_token
    return known.target_nll, softmax.nll().cpu(), kld.clamp_min_(0), same


def _bucket(p: Tensor, q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(p > 0, p * (p.clamp_min(tiny) / q.clamp_min(tiny)).log(), 0)
