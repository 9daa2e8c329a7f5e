"""Who goes to which routed expert: every token of a layer is routed once, before its experts are quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock
from quantkit.calibrate.chunk_sizes import own_rows
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputMoments, Inputs
from quantkit.calibrate.stream import ExpertTokens, row_batches
from quantkit.convert.experts import ExpertInputs, RoutedTokens
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import needs_hessian
from quantkit.convert.routers import fitted_router
from quantkit.convert.sums import combined_over
from quantkit.documents.journal import ExpertRecord
from quantkit.ranks.ranks import Ranks

if TYPE_CHECKING:
    from quantkit.arch.base import Weights


@dataclass(frozen=True, slots=True)
class RoutedStream:
    """One stream at an expert block: the block's inputs of this rank's rows, and who is routed where, of all ranks."""

    inputs: RowStore
    tokens: ExpertTokens

    def of_experts(self, experts: tuple[int, ...]) -> ExpertInputs:
        """The tokens that chose each of these experts."""
        return ExpertInputs(self.inputs, tuple(RoutedTokens(*self.tokens.of_expert(expert)) for expert in experts))


@dataclass(frozen=True, slots=True)
class Routes:
    """Routing of the calibrated stream and, if there is one, of the unquantised stream; the moments of the block's
    inputs over all tokens. ``borrowed[e]``: tokens (n,) int64, rising, that did not choose expert e but came nearest to
    it. ``changed``: the router that the calibrated stream was routed by, by name, where it is not the source's."""

    streams: tuple[RoutedStream, ...]
    pooled: Inputs
    borrowed: tuple[Tensor, ...]
    changed: Mapping[str, Tensor]

    def calibrated(self, experts: tuple[int, ...]) -> ExpertInputs:
        """The experts' tokens in the calibrated stream, the borrowed ones among them."""
        inputs = self.streams[0].of_experts(experts)
        pairs = zip(inputs.tokens, (self.borrowed[expert] for expert in experts), strict=True)
        return ExpertInputs(inputs.rows, tuple(_with_borrowed(own, borrowed) for own, borrowed in pairs))

    def unquantised(self, experts: tuple[int, ...]) -> ExpertInputs | None:
        """The experts' tokens in the unquantised stream."""
        return self.streams[1].of_experts(experts) if len(self.streams) > 1 else None

    def token_counts(self) -> list[int]:
        """How many tokens chose each expert in the calibrated stream."""
        return [self.streams[0].tokens.count(expert) for expert in range(len(self.borrowed))]

    def counts(self) -> tuple[ExpertRecord, ...]:
        """What each expert was given in the calibrated stream."""
        tokens = self.streams[0].tokens
        return tuple(
            ExpertRecord(tokens.count(expert), float(tokens.of_expert(expert)[1].sum()), len(borrowed))
            for expert, borrowed in enumerate(self.borrowed)
        )

    def close(self) -> None:
        """Free the inputs."""
        for stream in self.streams:
            stream.inputs.close()


def route(job: LayerJob, block: ExpertBlock) -> Routes:
    """Route every token of every stream, and pool the moments of the inputs over all tokens of the layer."""
    changed = {block.router: fitted_router(job, block)} if job.fits_routers else {}
    router = _Router(job, block, changed)
    (pooled,) = combined_over(job.ranks, ([router.route(rows)] for rows in job.hidden.rows.slices))
    streams = router.streams()
    nearest = router.nearest.over(job.ranks)
    return Routes(streams, pooled.stats(), nearest.missing(streams[0].tokens, job.min_expert_tokens), changed)


class _Router:
    """Routes the rows of all streams, slice by slice. ``changed``: weights of the calibrated stream alone."""

    def __init__(self, job: LayerJob, block: ExpertBlock, changed: Mapping[str, Tensor]) -> None:
        stores = job.hidden.stores()
        carried, *original = job.weights.by_stream(len(stores))
        self._weights = (_with(changed, carried), *original)
        self.nearest = _Nearest(block.n_experts, job.min_expert_tokens, job.hidden.x.device)
        self._job, self._block = job, block
        self._inputs = tuple(job.hidden.new_rows(store.width) for store in stores)
        self._chosen: list[list[Tensor]] = [[] for _ in stores]
        self._gates: list[list[Tensor]] = [[] for _ in stores]

    def route(self, rows: tuple[int, int]) -> InputMoments:
        """Route one slice of rows -> the moments of its inputs, from zero on."""
        job, block = self._job, self._block
        stores = job.hidden.stores()
        full = needs_hessian(job.outputs, (*block.gates, *block.ups))
        moments = InputMoments(job.hidden.x.width, cross=len(stores) > 1, device=job.device, full=full)
        for start, stop in row_batches(job.hidden.x, job.device, rows):
            batch: list[Tensor] = []
            for number, (weights, store) in enumerate(zip(self._weights, stores, strict=True)):
                h = block.inputs(weights, store.read(start, stop).to(job.device))
                routing = block.route(weights, h)
                self._inputs[number].write(start, h)
                self._chosen[number].append(routing.indices.to(store.device))
                self._gates[number].append(routing.weights.to(store.device))
                if number == 0:
                    first = (job.hidden.rows.first + start) * store.length
                    self.nearest.add(first, routing.scores.to(store.device), self._chosen[0][-1])
                batch.append(h)
            moments.add(batch[0], batch[1] if len(batch) > 1 else None)
        return moments

    def streams(self) -> tuple[RoutedStream, ...]:
        """Each stream's inputs of this rank and tokens of all ranks, once all rows are routed."""
        return tuple(
            RoutedStream(inputs, ExpertTokens.of(self._of_all(indices), self._of_all(weights), self._block.n_experts))
            for inputs, indices, weights in zip(self._inputs, self._chosen, self._gates, strict=True)
        )

    def _of_all(self, batches: list[Tensor]) -> Tensor:
        """Values of every token (tokens, top_k), those of rank 0 first."""
        own = torch.cat(batches)
        ranks, hidden = self._job.ranks, self._job.hidden
        if ranks.count == 1:
            return own
        counts = [own_rows(hidden.rows.n_rows, rank, ranks.count).count for rank in range(ranks.count)]
        found = [own.new_empty(n * hidden.x.length, own.shape[1], device=self._job.device) for n in counts]
        found[ranks.number].copy_(own)
        for rank, part in enumerate(found):
            ranks.broadcast(part, rank)
        return torch.cat(found).to(own.device)


def _with(changed: Mapping[str, Tensor], weights: Weights) -> Weights:
    """``weights``, some of them changed."""
    return weights if not changed else lambda name: changed[name] if name in changed else weights(name)


def _with_borrowed(own: RoutedTokens, borrowed: Tensor) -> RoutedTokens:
    token, order = torch.cat([own.token, borrowed]).sort()
    return RoutedTokens(token, torch.cat([own.share, own.share.new_zeros(len(borrowed))])[order])


class _Nearest:
    """For each expert the ``keep`` tokens with the highest scores among those that did not choose it, over all batches.
    Of equal scores the token with the lower number is nearer, in whatever batches they come."""

    def __init__(self, n_experts: int, keep: int, device: torch.device) -> None:
        self._keep = keep
        self._keys = torch.zeros(n_experts, 0, dtype=torch.int64, device=device)

    def add(self, first_token: int, scores: Tensor, chosen: Tensor) -> None:
        """scores (tokens, experts) float32, chosen (tokens, top_k): a batch that begins at token ``first_token``."""
        others = scores.scatter(1, chosen, -torch.inf).T
        numbers = torch.arange(first_token, first_token + len(scores), device=scores.device)
        keys = torch.cat([self._keys, _in_order(others) << 32 | _LAST_TOKEN - numbers], 1)
        self._keys = keys.topk(min(self._keep, keys.shape[1]), dim=1).values

    def over(self, ranks: Ranks) -> _Nearest:
        """The same over the tokens of all ranks."""
        if ranks.count > 1:
            keys = torch.cat([part.to(self._keys.device) for part in ranks.gathered(self._keys.cpu())], 1)
            self._keys = keys.topk(min(self._keep, keys.shape[1]), dim=1).values
        return self

    def missing(self, tokens: ExpertTokens, wanted: int) -> tuple[Tensor, ...]:
        """For each expert as many tokens as it lacks to ``wanted``, in rising order."""
        return tuple(self._of(expert, wanted - tokens.count(expert)) for expert in range(len(self._keys)))

    def _of(self, expert: int, count: int) -> Tensor:
        keys = self._keys[expert]
        near = _LAST_TOKEN - (keys[keys >> 32 > _NEVER] & _LAST_TOKEN)
        return near[: max(count, 0)].sort().values


_LAST_TOKEN = 2**32 - 1


def _in_order(scores: Tensor) -> Tensor:
    """Integers (int64, of 32 bits) in the order of float32 numbers."""
    bits = scores.contiguous().view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()


_NEVER = int(_in_order(torch.tensor(-torch.inf)))
