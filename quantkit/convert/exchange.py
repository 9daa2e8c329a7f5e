"""Routed experts on several ranks: who quantises which, and the way of their tokens there and back.

In a round each rank quantises a batch of experts. It gets what they read from the ranks that have the tokens, and sends
back what they add to the residual. The experts of a round follow one another, and each rank adds in their order: so a
token's sum has the bits of one process, and only a round's tokens are on the way at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock
from quantkit.calibrate.chunk_sizes import own_rows
from quantkit.calibrate.hidden_states import MemoryRows, RowStore
from quantkit.convert.expert_batches import experts_alike
from quantkit.convert.experts import ExpertInputs, ExpertOutputs, RoutedTokens
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.routing import Routes
from quantkit.ranks.shares import shared_out

EXPERT_TOKENS = 16_384
"""What is done for an expert whatever its tokens takes as long as so many tokens of its: on an H200 4.2 s for 256
experts of DeepSeek V3, and 3 s for their 4.2 million tokens."""

Round = tuple[tuple[int, ...], ...]
"""By rank the experts, rising, that it quantises in a round."""


def rounds_of(job: LayerJob, block: ExpertBlock, counts: Sequence[int]) -> Iterator[Round]:
    """Experts of one shape and treatment for all ranks at once, balanced by their tokens. ``counts``: of each expert of
    the block."""
    ranks = job.ranks.count
    for alike in experts_alike(job, block):
        for start in range(0, len(alike), ranks * job.experts_at_once):
            experts = alike[start : start + ranks * job.experts_at_once]
            sizes = [counts[expert] + EXPERT_TOKENS for expert in experts]
            owners = shared_out(sizes, ranks, -(-len(experts) // ranks))
            pairs = list(zip(experts, owners, strict=True))
            yield tuple(tuple(expert for expert, owner in pairs if owner == rank) for rank in range(ranks))


@dataclass(frozen=True, slots=True)
class JointTokens:
    """The tokens of every expert of a block in all streams together, sorted by expert and token. token (n,) int64;
    ``shares``: by stream the gate weights (n,) float32; ``chosen``: by stream whether the expert sees the token there
    (n,) bool. ``cuts[e][p]``: where the tokens of rank p begin among those of expert e; the last one is their end."""

    token: Tensor
    shares: tuple[Tensor, ...]
    chosen: tuple[Tensor, ...]
    cuts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, job: LayerJob, block: ExpertBlock, routes: Routes) -> JointTokens:
        """Of all experts of the block; on the device that computes."""
        experts = tuple(range(block.n_experts))
        calibrated, original = routes.calibrated(experts), routes.unquantised(experts)
        streams = [_keyed(one, job.device) for one in (calibrated, original) if one is not None]
        keys = torch.cat([key for key, _ in streams]).unique()
        shares, chosen = [], []
        for key, share in streams:
            place = torch.searchsorted(keys, key)
            shares.append(share.new_zeros(len(keys)).index_copy_(0, place, share))
            chosen.append(torch.zeros_like(keys, dtype=torch.bool).index_fill_(0, place, True))
        return cls(keys & _TOKEN, tuple(shares), tuple(chosen), _cuts(job, keys, block.n_experts))

    def span(self, expert: int, rank: int) -> tuple[int, int]:
        """[start, stop) of the tokens of a rank."""
        return self.cuts[expert][rank], self.cuts[expert][rank + 1]

    def count(self, expert: int, rank: int) -> int:
        """How many of an expert's tokens a rank has."""
        start, stop = self.span(expert, rank)
        return stop - start


_TOKEN = 2**32 - 1


def _keyed(inputs: ExpertInputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Expert and token in one number (n,) int64, rising, and the gate weights."""
    parts = [tokens.token.to(device) | expert << 32 for expert, tokens in enumerate(inputs.tokens)]
    return torch.cat(parts), torch.cat([tokens.share for tokens in inputs.tokens]).to(device)


def _cuts(job: LayerJob, keys: Tensor, n_experts: int) -> tuple[tuple[int, ...], ...]:
    hidden, ranks = job.hidden, job.ranks.count
    firsts = [own_rows(hidden.rows.n_rows, rank, ranks).first * hidden.x.length for rank in range(ranks)]
    bounds = [[expert << 32 | token for token in (*firsts, _TOKEN)] for expert in range(n_experts)]
    places = torch.searchsorted(keys, torch.tensor(bounds, device=keys.device))
    return tuple(map(tuple, places.tolist()))


@dataclass(frozen=True, slots=True)
class ExchangedBatch:
    """This rank's experts of a round, with what they read of all ranks' tokens. ``calibrated``, ``unquantised``: as in
    `ExpertsTask`; their token numbers are places in what was exchanged."""

    job: LayerJob
    joint: JointTokens
    round: Round
    calibrated: ExpertInputs
    unquantised: ExpertInputs | None
    dtype: torch.dtype

    @property
    def experts(self) -> tuple[int, ...]:
        """Those of this rank; none if there are fewer experts than ranks."""
        return self.round[self.job.ranks.number]

    @classmethod
    def fetched(
        cls, job: LayerJob, joint: JointTokens, turn: Round, inputs: Sequence[RowStore], dtype: torch.dtype
    ) -> ExchangedBatch:
        """Fetch what the experts of this rank read, and give other ranks theirs. ``inputs``: the block's, by stream;
        ``dtype``: of what experts add."""
        found = [_fetched(job, joint, turn, rows, number) for number, rows in enumerate(inputs)]
        return cls(job, joint, turn, found[0], found[1] if len(found) > 1 else None, dtype)

    def add(self, number: int, outputs: ExpertOutputs | None) -> None:
        """Add what all experts of the round give to the residual of stream ``number``, in the order of the experts.
        ``outputs``: of this rank's experts, None without any."""
        job, stores = self.job, self.job.hidden.stores()
        to_each, from_each = _row_counts(job, self.joint, self.round)
        back = torch.empty(sum(from_each), stores[number].width, device=job.device, dtype=self.dtype)
        for change in outputs.changes() if outputs is not None else ():
            back[change.tokens] = change.values.to(self.dtype)
            del change  # before the next one is made
        values, start = job.ranks.exchange(back, from_each, to_each), 0
        del back
        places: dict[int, int] = {}
        for owned in self.round:
            for expert in owned:
                places[expert] = start
                start += self.joint.count(expert, job.ranks.number)
        for expert in sorted(places):
            self._add_expert(number, expert, values[places[expert] :])

    def _add_expert(self, number: int, expert: int, values: Tensor) -> None:
        """``values``: begin with those of this expert for this rank's tokens."""
        span = slice(*self.joint.span(expert, self.job.ranks.number))
        mine = self.joint.chosen[number][span]
        store = self.job.hidden.stores()[number]
        token = self.joint.token[span][mine] - self.job.hidden.rows.first * store.length
        store.add(token, values[: len(mine)][mine], self.joint.shares[number][span][mine])


def _row_counts(job: LayerJob, joint: JointTokens, turn: Round) -> tuple[list[int], list[int]]:
    """Rows that this rank sends to each in a round, and gets from each."""
    own, ranks = job.ranks.number, range(job.ranks.count)
    to_each = [sum(joint.count(expert, own) for expert in turn[rank]) for rank in ranks]
    from_each = [sum(joint.count(expert, rank) for expert in turn[own]) for rank in ranks]
    return to_each, from_each


def _fetched(job: LayerJob, joint: JointTokens, turn: Round, rows: RowStore, number: int) -> ExpertInputs:
    """What this rank's experts read in stream ``number``."""
    own = job.ranks.number
    spans = [joint.token[slice(*joint.span(expert, own))] for owned in turn for expert in owned]
    local = torch.cat(spans) - job.hidden.rows.first * rows.length
    given = rows.gather(local).to(job.device)
    found = job.ranks.exchange(given, *_row_counts(job, joint, turn))
    return ExpertInputs(MemoryRows.of(found), _places(job, joint, turn[own], number))


def _places(job: LayerJob, joint: JointTokens, experts: tuple[int, ...], number: int) -> tuple[RoutedTokens, ...]:
    """Of each expert the places of its tokens among the rows that came: those of rank 0 first, expert by expert."""
    starts, at = {}, 0
    for rank in range(job.ranks.count):
        for expert in experts:
            starts[expert, rank] = at
            at += joint.count(expert, rank)
    found: list[RoutedTokens] = []
    for expert in experts:
        parts = [
            torch.arange(starts[expert, rank], starts[expert, rank] + joint.count(expert, rank), device=job.device)
            for rank in range(job.ranks.count)
        ]
        span = slice(joint.cuts[expert][0], joint.cuts[expert][-1])
        mine = joint.chosen[number][span]
        found.append(RoutedTokens(torch.cat(parts)[mine], joint.shares[number][span][mine]))
    return tuple(found)
