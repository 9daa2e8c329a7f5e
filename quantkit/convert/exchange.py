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


Cuts = tuple[tuple[int, ...], ...]
"""By expert: where the tokens of each rank begin in a list sorted by expert and token, and at last their end."""


@dataclass(frozen=True, slots=True)
class StreamTokens:
    """The tokens of every expert in one stream, sorted by expert and token: their gate weights (n,) float32, and where
    they are among the joint ones (n,) int64."""

    share: Tensor
    place: Tensor
    cuts: Cuts

    def of_expert(self, expert: int) -> slice:
        """Those of all ranks."""
        return slice(self.cuts[expert][0], self.cuts[expert][-1])

    def of_rank(self, expert: int, rank: int) -> slice:
        """Those of one rank."""
        return slice(self.cuts[expert][rank], self.cuts[expert][rank + 1])


@dataclass(frozen=True, slots=True)
class JointTokens:
    """The tokens of every expert of a block in all streams together, sorted by expert and token (n,) int64: a row that
    both streams need is sent once of each. Everything that says how many is known to the processor, so a GPU is not
    waited for in a round."""

    token: Tensor
    cuts: Cuts
    streams: tuple[StreamTokens, ...]

    @classmethod
    def of(cls, job: LayerJob, block: ExpertBlock, routes: Routes) -> JointTokens:
        """Of all experts of the block; on the device that computes."""
        experts = tuple(range(block.n_experts))
        inputs = (routes.calibrated(experts), routes.unquantised(experts))
        keyed = [_keyed(one, job.device) for one in inputs if one is not None]
        keys = torch.cat([own for own, _ in keyed]).unique()
        streams = (
            StreamTokens(share, torch.searchsorted(keys, own), _cuts(job, own, block.n_experts)) for own, share in keyed
        )
        return cls(keys & _TOKEN, _cuts(job, keys, block.n_experts), tuple(streams))

    def of_rank(self, expert: int, rank: int) -> slice:
        """The tokens of one rank."""
        return slice(self.cuts[expert][rank], self.cuts[expert][rank + 1])

    def count(self, expert: int, rank: int) -> int:
        """How many of an expert's tokens a rank has."""
        return self.cuts[expert][rank + 1] - self.cuts[expert][rank]


_TOKEN = 2**32 - 1


def _keyed(inputs: ExpertInputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Expert and token in one number (n,) int64, rising, and the gate weights."""
    parts = [tokens.token.to(device) | expert << 32 for expert, tokens in enumerate(inputs.tokens)]
    return torch.cat(parts), torch.cat([tokens.share for tokens in inputs.tokens]).to(device)


def _cuts(job: LayerJob, keys: Tensor, n_experts: int) -> Cuts:
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
        own, stream = self.job.ranks.number, self.joint.streams[number]
        store, span = self.job.hidden.stores()[number], stream.of_rank(expert, self.job.ranks.number)
        place = stream.place[span]
        token = self.joint.token[place] - self.job.hidden.rows.first * store.length
        store.add(token, values[place - self.joint.cuts[expert][own]], stream.share[span])


def _row_counts(job: LayerJob, joint: JointTokens, turn: Round) -> tuple[list[int], list[int]]:
    """Rows that this rank sends to each in a round, and gets from each."""
    own, ranks = job.ranks.number, range(job.ranks.count)
    to_each = [sum(joint.count(expert, own) for expert in turn[rank]) for rank in ranks]
    from_each = [sum(joint.count(expert, rank) for expert in turn[own]) for rank in ranks]
    return to_each, from_each


def _fetched(job: LayerJob, joint: JointTokens, turn: Round, rows: RowStore, number: int) -> ExpertInputs:
    """What this rank's experts read in stream ``number``."""
    own = job.ranks.number
    spans = [joint.token[joint.of_rank(expert, own)] for owned in turn for expert in owned]
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
    stream, found = joint.streams[number], list[RoutedTokens]()
    for expert in experts:
        parts = [
            torch.arange(starts[expert, rank], starts[expert, rank] + joint.count(expert, rank), device=job.device)
            for rank in range(job.ranks.count)
        ]
        span = stream.of_expert(expert)
        place = stream.place[span] - joint.cuts[expert][0]
        found.append(RoutedTokens(torch.cat(parts)[place], stream.share[span]))
    return tuple(found)
