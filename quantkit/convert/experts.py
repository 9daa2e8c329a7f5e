"""Routed experts of a layer, expert-major.

The layer's tokens are routed once and sorted by expert; then, a batch of experts at a time: gather tokens, moments,
quantise gate and up together, hidden from the *quantised* gate and up, quantise down, add to the residual. A layer's
Hessians never exist all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock
from quantkit.calibrate.chunk_sizes import EXPERT_CHUNK, at_once
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputMoments, Inputs, shrunk, shrunk_to_diagonal
from quantkit.calibrate.stream import ExpertTokens, add_expert_output, expert_hidden, forward_expert, row_batches
from quantkit.convert.layer_job import ExpertCounts, LayerJob
from quantkit.convert.outputs import Linears, any_wanted, needs_inputs, quantize_linears
from quantkit.plan.phases import KEPT_HIDDEN
from quantkit.quantizers.batch import QuantizedBatch


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream at an expert block: its residual, the block's inputs, and who is routed where."""

    x: RowStore
    h: RowStore
    tokens: ExpertTokens


@dataclass(frozen=True, slots=True)
class Routes:
    """Who goes where, and the moments over all tokens. ``borrowed[e]``: tokens (n,) int64, rising, that did not choose
    expert e but came nearest to it."""

    streams: tuple[_Stream, ...]
    pooled: Inputs
    borrowed: tuple[Tensor, ...]


def route(job: LayerJob, block: ExpertBlock) -> Routes:
    """Route every token of every stream once, and pool the moments of the inputs over all tokens of the layer."""
    stores = job.hidden.stores()
    inputs_of = tuple(job.new_rows(store.width) for store in stores)
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
        _Stream(store, h, ExpertTokens.of(torch.cat(indices), torch.cat(weights), block.n_experts))
        for store, h, indices, weights in zip(stores, inputs_of, chosen, gates, strict=True)
    )
    return Routes(streams, pooled.stats(), nearest.missing(streams[0].tokens, job.min_expert_tokens))


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


def quantize_experts(job: LayerJob, block: ExpertBlock, routes: Routes) -> None:
    """Quantise the experts and add their outputs to the streams. Closes the inputs that `route` kept."""
    tokens = routes.streams[0].tokens
    job.counts[block.name] = [
        ExpertCounts(tokens.count(e), float(tokens.of_expert(e)[1].sum()), len(routes.borrowed[e]))
        for e in range(block.n_experts)
    ]
    for experts in expert_batches(job, block):
        _quantize_batch(_Batch(job, block, routes, experts, tuple(_chosen(routes, expert) for expert in experts)))
    for stream in routes.streams:
        stream.h.close()


def expert_batches(job: LayerJob, block: ExpertBlock) -> Iterator[tuple[int, ...]]:
    """Experts that every output treats alike, at most ``experts_at_once`` together."""

    def treatment(expert: int) -> tuple[object, ...]:
        names = (block.gates[expert], block.ups[expert], block.downs[expert])
        return tuple(output.methods.get(name) for output in job.outputs for name in names)

    for _, alike in groupby(range(block.n_experts), key=treatment):
        experts = tuple(alike)
        for start in range(0, len(experts), job.experts_at_once):
            yield experts[start : start + job.experts_at_once]


def linears_of(job: LayerJob, names: tuple[str, ...], experts: tuple[int, ...]) -> Linears:
    """One projection of some experts, (B, out, in): bfloat16 if the streams compute with all of them in it, else
    float32."""
    chosen = tuple(names[expert] for expert in experts)
    wide = any(job.weights.dtype(name) == torch.float32 for name in chosen)
    dtype = torch.float32 if wide else torch.bfloat16
    weight = torch.empty(len(chosen), *job.weights.shape(chosen[0]), device=job.device, dtype=dtype)
    for one, name in zip(weight, chosen, strict=True):
        one.copy_(job.weights.from_source(name))
    return Linears(chosen, weight)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Tokens of one expert: its own and the borrowed ones (n,) int64, rising, and their gate weights (n,), 0 of the
    borrowed."""

    token: Tensor
    share: Tensor

    def chunks(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, shares) of as many as ``device`` takes at once."""
        size = at_once(EXPERT_CHUNK, device)
        return zip(self.token.split(size), self.share.split(size), strict=True)


def _chosen(routes: Routes, expert: int) -> _Chosen:
    own, share = routes.streams[0].tokens.of_expert(expert)
    borrowed = routes.borrowed[expert]
    token, order = torch.cat([own, borrowed]).sort()
    return _Chosen(token, torch.cat([share, share.new_zeros(len(borrowed))])[order])


@dataclass(frozen=True, slots=True)
class _Batch:
    """Experts that are quantised together, and the tokens of each."""

    job: LayerJob
    block: ExpertBlock
    routes: Routes
    experts: tuple[int, ...]
    tokens: tuple[_Chosen, ...]

    def moments(self, width: int, linears: tuple[Linears, ...]) -> InputMoments:
        """Empty sums for what linears of these experts read."""
        names = tuple(one.names[0] for one in linears)
        return InputMoments(
            width,
            cross=len(self.routes.streams) > 1,
            device=self.job.device,
            matrices=len(self.experts),
            full=needs_inputs(self.job.outputs, names),
        )

    def gathered(self, number: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The block's inputs of an expert's tokens, chunk by chunk, in the stream that is carried and, if there is one,
        in the original stream."""
        for token, _ in self.tokens[number].chunks(self.job.device):
            own, *others = (self.inputs(stream, token) for stream in self.routes.streams)
            yield own, others[0] if others else None

    def inputs(self, stream: _Stream, token: Tensor) -> Tensor:
        """The block's inputs of tokens (n,) in a stream, (n, hidden) on the device."""
        return stream.h.gather(token).to(self.job.device)


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a stream computes with in a batch of experts: gate and up (B, inter, hidden), down (B, hidden, inter)."""

    block: ExpertBlock
    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def nbytes(self) -> int:
        """Of all experts."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    def hidden(self, number: int, h: Tensor) -> Tensor:
        """h (tokens, hidden) -> (tokens, inter) of one expert."""
        return expert_hidden(self.block, self.gate[number], self.up[number], h)

    def of(self, name: str, expert: int, number: int) -> Tensor:
        """By the name of a tensor of this expert."""
        places = {self.block.gates[expert]: self.gate, self.block.ups[expert]: self.up}
        return places.get(name, self.down)[number]


def _quantize_batch(batch: _Batch) -> None:
    job, block = batch.job, batch.block
    gate, up, down = (linears_of(job, names, batch.experts) for names in (block.gates, block.ups, block.downs))
    new_gate, new_up = _quantize_gate_up(batch, gate, up)
    original = carried = _Weights(block, gate.weight, up.weight, down.weight)
    if job.weights.carries_quantised:
        carried = replace(original, gate=new_gate.to(original.gate.dtype), up=new_up.to(original.up.dtype))
    del gate, up, new_gate, new_up
    moments = batch.moments(down.weight.shape[-1], (down,)) if any_wanted(job.outputs, down.names) else None
    hidden = _hidden(batch, carried, original, moments)
    if moments is not None:
        new_down = _quantize_down(batch, down, moments.stats())
        if job.weights.carries_quantised:
            carried = replace(carried, down=new_down.to(original.down.dtype))
    del down, moments
    _carry_on(batch, hidden, carried)
    for stream in batch.routes.streams[1:]:
        for number, expert in enumerate(batch.experts):
            weights = partial(original.of, expert=expert, number=number)
            forward_expert(block, weights, expert, stream.tokens, stream.x, stream.h, job.device)


def _quantize_gate_up(batch: _Batch, gate: Linears, up: Linears) -> list[Tensor]:
    """What the first output makes of gate and up, or the originals."""
    job = batch.job
    if not any_wanted(job.outputs, (gate.names[0], up.names[0])):
        return [gate.weight, up.weight]
    stats = _input_stats(batch, gate, up)
    _note_importance(job, (gate, up), stats)
    pooled = batch.routes.pooled
    batches = quantize_linears(
        job.outputs,
        (gate, up),
        stats,
        job.deliver,
        lambda own, method: shrunk(own, pooled, method.shrinkage[0]),
    )
    return _decoded(batches, (gate, up))


def _quantize_down(batch: _Batch, down: Linears, stats: Inputs) -> Tensor:
    _note_importance(batch.job, (down,), stats)
    batches = quantize_linears(
        batch.job.outputs,
        (down,),
        stats,
        batch.job.deliver,
        lambda own, method: shrunk_to_diagonal(own, method.shrinkage[1]),
    )
    return _decoded(batches, (down,))[0]


def _input_stats(batch: _Batch, gate: Linears, up: Linears) -> Inputs:
    """Moments of what each expert reads, (B, hidden, hidden)."""
    moments = batch.moments(gate.weight.shape[-1], (gate, up))
    for number in range(len(batch.experts)):
        for own, original in batch.gathered(number):
            moments.add(own, original, number)
    return moments.stats()


_Kept = list[list["Tensor | None"]]
"""By expert and chunk of its tokens: what its down projection reads in the carried stream, None where that was not
kept."""


def _hidden(batch: _Batch, carried: _Weights, original: _Weights, moments: InputMoments | None) -> _Kept:
    """What each down projection reads, as far as there is room for it, and its moments."""
    found, room = _Kept(), KEPT_HIDDEN * carried.nbytes
    for number in range(len(batch.experts)):
        found.append([])
        for own, other in batch.gathered(number):
            hidden = carried.hidden(number, own)
            room -= hidden.nbytes
            found[-1].append(hidden if room >= 0 else None)
            if moments is not None:
                moments.add(hidden, None if other is None else original.hidden(number, other), number)
    return found


def _carry_on(batch: _Batch, hidden: _Kept, carried: _Weights) -> None:
    """Add the experts' outputs to the residual of the carried stream."""
    stream = batch.routes.streams[0]
    for number, (tokens, parts) in enumerate(zip(batch.tokens, hidden, strict=True)):
        for (token, share), kept in zip(tokens.chunks(batch.job.device), parts, strict=True):
            inputs = carried.hidden(number, batch.inputs(stream, token)) if kept is None else kept
            add_expert_output(inputs, carried.down[number], token, share, stream.x)


def _note_importance(job: LayerJob, group: tuple[Linears, ...], stats: Inputs) -> None:
    for output in job.outputs:
        for linears in group:
            for name, row, n_tokens in zip(linears.names, stats.importance, stats.n_tokens, strict=True):
                if output.sink.wants_importance(name):
                    output.sink.write_importance(name, row.unsqueeze(0), (n_tokens,))


def _decoded(batches: tuple[QuantizedBatch | None, ...], originals: tuple[Linears, ...]) -> list[Tensor]:
    """(B, out, in) each: what the first output made of a linear, float32, or the original where it keeps it."""
    return [
        linears.weight if batch is None else batch.decode() for batch, linears in zip(batches, originals, strict=True)
    ]
