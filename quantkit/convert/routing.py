"""Who goes to which routed expert: every token of a layer is routed once, before its experts are quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputMoments, Inputs
from quantkit.calibrate.stream import ExpertTokens, row_batches
from quantkit.convert.experts import ExpertInputs, RoutedTokens
from quantkit.convert.layer_job import ExpertCounts, LayerJob
from quantkit.convert.outputs import needs_inputs


@dataclass(frozen=True, slots=True)
class RoutedStream:
    """One stream at an expert block: the block's inputs, and who is routed where."""

    inputs: RowStore
    tokens: ExpertTokens

    def of_experts(self, experts: tuple[int, ...]) -> ExpertInputs:
        """The tokens that chose each of these experts."""
        return ExpertInputs(self.inputs, tuple(RoutedTokens(*self.tokens.of_expert(expert)) for expert in experts))


@dataclass(frozen=True, slots=True)
class Routes:
    """Routing of the calibrated stream and, if there is one, of the unquantised stream; the moments of the block's
    inputs over all tokens. ``borrowed[e]``: tokens (n,) int64, rising, that did not choose expert e but came nearest to
    it."""

    streams: tuple[RoutedStream, ...]
    pooled: Inputs
    borrowed: tuple[Tensor, ...]

    def calibrated(self, experts: tuple[int, ...]) -> ExpertInputs:
        """The experts' tokens in the calibrated stream, the borrowed ones among them."""
        inputs = self.streams[0].of_experts(experts)
        pairs = zip(inputs.tokens, (self.borrowed[expert] for expert in experts), strict=True)
        return ExpertInputs(inputs.rows, tuple(_with_borrowed(own, borrowed) for own, borrowed in pairs))

    def unquantised(self, experts: tuple[int, ...]) -> ExpertInputs | None:
        """The experts' tokens in the unquantised stream."""
        return self.streams[1].of_experts(experts) if len(self.streams) > 1 else None

    def counts(self) -> list[ExpertCounts]:
        """What each expert was given in the calibrated stream."""
        tokens = self.streams[0].tokens
        return [
            ExpertCounts(tokens.count(expert), float(tokens.of_expert(expert)[1].sum()), len(borrowed))
            for expert, borrowed in enumerate(self.borrowed)
        ]

    def close(self) -> None:
        """Free the inputs."""
        for stream in self.streams:
            stream.inputs.close()


def route(job: LayerJob, block: ExpertBlock) -> Routes:
    """Route every token of every stream, and pool the moments of the inputs over all tokens of the layer."""
    stores = job.hidden.stores()
    inputs_of = tuple(job.hidden.new_rows(store.width) for store in stores)
    full = needs_inputs(job.outputs, (*block.gates, *block.ups))
    pooled = InputMoments(job.hidden.x.width, cross=len(stores) > 1, device=job.device, full=full)
    nearest = _Nearest(block.n_experts, job.min_expert_tokens, job.hidden.x.device)
    chosen: list[list[Tensor]] = [[] for _ in stores]
    gates: list[list[Tensor]] = [[] for _ in stores]
    for start, stop in row_batches(job.hidden.x, job.device):
        batch: list[Tensor] = []
        for number, (weights, store) in enumerate(zip(job.weights.by_stream(len(stores)), stores, strict=True)):
            h = block.inputs(weights, store.read(start, stop).to(job.device))
            routing = block.route(weights, h)
            inputs_of[number].write(start, h)
            chosen[number].append(routing.indices.to(store.device))
            gates[number].append(routing.weights.to(store.device))
            if number == 0:
                nearest.add(start * store.length, routing.scores.to(store.device), chosen[0][-1])
            batch.append(h)
        pooled.add(batch[0], batch[1] if len(batch) > 1 else None)
    streams = tuple(
        RoutedStream(inputs, ExpertTokens.of(torch.cat(indices), torch.cat(weights), block.n_experts))
        for inputs, indices, weights in zip(inputs_of, chosen, gates, strict=True)
    )
    return Routes(streams, pooled.stats(), nearest.missing(streams[0].tokens, job.min_expert_tokens))


def _with_borrowed(own: RoutedTokens, borrowed: Tensor) -> RoutedTokens:
    token, order = torch.cat([own.token, borrowed]).sort()
    return RoutedTokens(token, torch.cat([own.share, own.share.new_zeros(len(borrowed))])[order])


class _Nearest:
    """For each expert the ``keep`` tokens with the highest scores among those that did not choose it, over all
    batches."""

    def __init__(self, n_experts: int, keep: int, device: torch.device) -> None:
        self._keep = keep
        self._scores = torch.full((n_experts, 0), -torch.inf, device=device)
        self._tokens = torch.zeros(n_experts, 0, dtype=torch.int64, device=device)

    def add(self, first_token: int, scores: Tensor, chosen: Tensor) -> None:
        """scores (tokens, experts), chosen (tokens, top_k): a batch that begins at token ``first_token``."""
        others = scores.scatter(1, chosen, -torch.inf).T
        numbers = torch.arange(first_token, first_token + len(scores), device=scores.device).expand(others.shape)
        scores, tokens = torch.cat([self._scores, others], 1), torch.cat([self._tokens, numbers], 1)
        self._scores, best = scores.topk(min(self._keep, scores.shape[1]), dim=1)
        self._tokens = tokens.gather(1, best)

    def missing(self, tokens: ExpertTokens, wanted: int) -> tuple[Tensor, ...]:
        """For each expert as many tokens as it lacks to ``wanted``, in rising order."""
        return tuple(self._of(expert, wanted - tokens.count(expert)) for expert in range(len(self._scores)))

    def _of(self, expert: int, count: int) -> Tensor:
        near = self._tokens[expert][self._scores[expert] > -torch.inf]
        return near[: max(count, 0)].sort().values
