"""One decoder layer: calibrate, quantise, write and carry the hidden states on.

Dense blocks: stage by stage over batches of rows, each stage's statistics taken with the earlier stages' quantised
weights.
Routed experts: expert-major. The layer's tokens are routed once and sorted by expert; then, a batch of experts at a
time: gather tokens, moments, quantise gate and up together, hidden from the *quantised* gate and up, quantise down, add
to the residual. A layer's Hessians never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, InputGroup, Stage, Sublayer
from quantkit.arch.ops import linear
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputImportance, InputMoments, Inputs, shrunk, shrunk_to_diagonal
from quantkit.calibrate.portions import EXPERT_CHUNK, at_once
from quantkit.calibrate.stream import ExpertTokens, add_expert_output, expert_hidden, forward_expert, row_batches
from quantkit.pipeline.hidden import Streams
from quantkit.pipeline.outputs import (
    Deliver,
    Linears,
    OutputJob,
    any_quantised,
    any_wanted,
    needs_inputs,
    quantize_linears,
)
from quantkit.pipeline.weights import LayerWeights
from quantkit.quantizers.batch import QuantizedBatch


@dataclass(slots=True)
class ExpertCounts:
    """What the router gave an expert: tokens, the sum of their gate weights, and tokens borrowed because there were too
    few."""

    n_tokens: int
    gate_weight: float
    borrowed: int = 0


@dataclass(frozen=True, slots=True)
class LayerJob:
    """Everything one layer needs. ``new_rows(width)`` makes a scratch store for all tokens, in memory or on disk.

    ``min_expert_tokens``: experts with fewer tokens borrow those that came nearest to choosing them, for the statistics
    only.
    ``deliver``: takes what was made to the sinks, now or later.
    ``expect(names)``: hears which weights of routed experts will be read next.
    ``streams`` is None in a data-free conversion. ``experts_at_once``: how many experts of one shape are one batch.
    ``importance(names)``: what an imatrix file knows of the inputs of linears of one shape, on the device, for
    conversions without streams.
    """

    outputs: tuple[OutputJob, ...]
    weights: LayerWeights
    streams: Streams | None
    new_rows: Callable[[int], RowStore]
    deliver: Deliver
    on_stage: Callable[[str, int], None]
    device: torch.device
    experts_at_once: int
    min_expert_tokens: int
    expect: Callable[[list[str]], None] = lambda names: None
    importance: Callable[[tuple[str, ...]], InputImportance | None] = lambda names: None
    counts: dict[str, list[ExpertCounts]] = field(default_factory=dict[str, list[ExpertCounts]])

    @property
    def hidden(self) -> Streams:
        """The streams of a calibrated layer."""
        assert self.streams is not None, "a data-free layer has no hidden states"
        return self.streams


def quantize_layer(job: LayerJob, sublayers: tuple[Sublayer, ...]) -> None:
    """Quantise and write every linear of the layer that some output quantises, and carry the streams through it in
    place."""
    _announce(job, (block for sublayer in sublayers for block in sublayer))
    for sublayer in sublayers:
        # Blocks of a sublayer read the same x. The routed experts keep their inputs, so the dense block may add to x
        # first.
        routed = [(block, _route(job, block)) for block in sublayer if isinstance(block, ExpertBlock)]
        dense = [block for block in sublayer if isinstance(block, DenseBlock)]
        assert len(dense) <= 1, "a second dense block would read what the first has added"
        for block in dense:
            names = (name for stage in block.stages for group in stage.groups for name in group.linears)
            job.on_stage(block.name, sum(name in job.outputs[0].methods for name in names))
            _quantize_dense(job, block)
        for block, routes in routed:
            job.on_stage(block.name, 3 * block.n_experts)
            _quantize_experts(job, block, routes)


def quantize_without_inputs(job: LayerJob, blocks: tuple[Block, ...]) -> None:
    """The same for a data-free conversion: no hidden states, each linear alone."""
    _announce(job, blocks)
    for block in blocks:
        if isinstance(block, DenseBlock):
            for name in (name for stage in block.stages for group in stage.groups for name in group.linears):
                _quantize_group(job, InputGroup((name,)), job.importance((name,)))
            job.weights.forget()
            continue
        for experts in _expert_batches(job, block):
            for names in (block.gates, block.ups, block.downs):
                linears = _linears(job, names, experts)
                quantize_linears(job.outputs, (linears,), job.importance(linears.names), job.deliver)


def _announce(job: LayerJob, blocks: Iterable[Block]) -> None:
    routed = (block for block in blocks if isinstance(block, ExpertBlock))
    batches = ((block, experts) for block in routed for experts in _expert_batches(job, block))
    parts = ((names, experts) for block, experts in batches for names in (block.gates, block.ups, block.downs))
    job.expect([names[expert] for names, experts in parts for expert in experts])


# Dense blocks


def _quantize_dense(job: LayerJob, block: DenseBlock) -> None:
    context = job.new_rows(job.weights.shape(block.output)[1])
    for stage in block.stages:
        last = stage is block.stages[-1]
        if not (last or any(any_wanted(job.outputs, group.linears) for group in stage.groups)):
            continue
        moments = _moments_of_stage(job, stage, block.output, context if last else None)
        for group, sums in zip(stage.groups, moments, strict=True):
            _quantize_group(job, group, sums.stats())
    weights, *_ = job.weights.by_stream(len(job.hidden.stores()))
    _add_output(weights(block.output), job.hidden.x, context)
    context.close()
    job.weights.forget()


def _moments_of_stage(job: LayerJob, stage: Stage, output: str, context: RowStore | None) -> list[InputMoments]:
    """The moments of each group's inputs over all rows. In the last stage ``context`` keeps what the output projection
    reads of the calibrated stream, until that is quantised; the original stream takes its own at once."""
    stores = job.hidden.stores()
    original_output = job.weights.original(output) if context is not None and len(stores) == 2 else None
    needed = any(any_wanted(job.outputs, group.linears) for group in stage.groups)
    moments: list[InputMoments] = []
    for start, stop in row_batches(job.hidden.x, job.device):
        rows = [store.read(start, stop).to(job.device) for store in stores]
        own, *others = (
            stage.inputs(weights, x) for weights, x in zip(job.weights.by_stream(len(stores)), rows, strict=True)
        )
        moments = moments or [
            InputMoments.like(x, cross=bool(others), full=needs_inputs(job.outputs, group.linears))
            for x, group in zip(own, stage.groups, strict=True)
        ]
        for number, sums in enumerate(moments if needed else ()):
            sums.add(own[number], others[0][number] if others else None)
        if context is not None:
            context.write(start, own[0])
        if original_output is not None:
            (_, original) = stores
            original.write(start, rows[1] + linear(others[0][0], original_output).view_as(rows[1]))
    return moments


def _quantize_group(job: LayerJob, group: InputGroup, stats: Inputs | None) -> None:
    if stats is not None:
        _note_importance(job, group.linears, stats)
    names = tuple(name for name in group.linears if any_quantised(job.outputs, (name,)))
    if not names:
        return
    batch = 1 if stats is None else len(stats.importance)
    linears = tuple(Linears((name,), _in_matrices(job.weights.read(name), batch)) for name in names)
    for name, result in zip(names, quantize_linears(job.outputs, linears, stats, job.deliver), strict=True):
        if result is not None:
            job.weights.carry(name, result)


def _in_matrices(weight: Tensor, count: int) -> Tensor:
    """(out, in), or (heads, out, in) of a part -> (count, ..., in): all rows together if their inputs are one."""
    return weight.reshape(count, -1, weight.shape[-1])


def _note_importance(job: LayerJob, names: tuple[str, ...], stats: Inputs) -> None:
    """Let the outputs that keep it know what the inputs of dense linears, or of one projection of some experts, are."""
    if job.streams is None:
        return
    for output in job.outputs:
        for name in filter(output.sink.wants_importance, names):
            output.sink.write_importance(name, stats.importance, stats.n_tokens)


def _add_output(weight: Tensor, store: RowStore, context: RowStore) -> None:
    for start, stop in row_batches(store, weight.device):
        rows, inputs = (part.read(start, stop).to(weight.device) for part in (store, context))
        store.write(start, rows + linear(inputs, weight))


# Routed experts


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream at an expert block: its residual, the block's inputs, and who is routed where."""

    x: RowStore
    h: RowStore
    tokens: ExpertTokens


@dataclass(frozen=True, slots=True)
class _Routes:
    """``borrowed[e]``: tokens (n,) int64, rising, that did not choose expert e but came nearest to it."""

    streams: tuple[_Stream, ...]
    pooled: Inputs
    borrowed: tuple[Tensor, ...]


def _route(job: LayerJob, block: ExpertBlock) -> _Routes:
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
    return _Routes(streams, pooled.stats(), nearest.missing(streams[0].tokens, job.min_expert_tokens))


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


def _quantize_experts(job: LayerJob, block: ExpertBlock, routes: _Routes) -> None:
    tokens = routes.streams[0].tokens
    job.counts[block.name] = [
        ExpertCounts(tokens.count(e), float(tokens.of_expert(e)[1].sum()), len(routes.borrowed[e]))
        for e in range(block.n_experts)
    ]
    for experts in _expert_batches(job, block):
        _quantize_expert_batch(job, block, routes, experts)
    for stream in routes.streams:
        stream.h.close()


def _expert_batches(job: LayerJob, block: ExpertBlock) -> Iterator[tuple[int, ...]]:
    """Experts that every output treats alike, at most ``experts_at_once`` together."""

    def treatment(expert: int) -> tuple[object, ...]:
        names = (block.gates[expert], block.ups[expert], block.downs[expert])
        return tuple(output.methods.get(name) for output in job.outputs for name in names)

    for _, alike in groupby(range(block.n_experts), key=treatment):
        experts = tuple(alike)
        for start in range(0, len(experts), job.experts_at_once):
            yield experts[start : start + job.experts_at_once]


def _linears(job: LayerJob, names: tuple[str, ...], experts: tuple[int, ...]) -> Linears:
    chosen = tuple(names[expert] for expert in experts)
    weight = torch.empty(len(chosen), *job.weights.shape(chosen[0]), device=job.device)
    for one, name in zip(weight, chosen, strict=True):
        one.copy_(job.weights.read(name))
    return Linears(chosen, weight)


def _quantize_expert_batch(job: LayerJob, block: ExpertBlock, routes: _Routes, experts: tuple[int, ...]) -> None:
    gate, up, down = (_linears(job, names, experts) for names in (block.gates, block.ups, block.downs))
    tokens = tuple(_tokens_for_statistics(routes, expert) for expert in experts)
    new_gate, new_up = gate.weight, up.weight
    if any_wanted(job.outputs, (gate.names[0], up.names[0])):
        stats = _input_stats(job, routes, tokens, full=needs_inputs(job.outputs, (gate.names[0], up.names[0])))
        _note_expert_importance(job, (gate, up), stats)
        batches = quantize_linears(
            job.outputs,
            (gate, up),
            stats,
            job.deliver,
            lambda own, method: shrunk(own, routes.pooled, method.shrinkage[0]),
        )
        new_gate, new_up = _decoded(batches, (gate, up))
        del stats
    dtype = job.weights.dtype(gate.names[0])
    original = _Experts(block, *(linears.weight.to(dtype) for linears in (gate, up, down)))
    del gate, up
    carried = original
    if job.weights.carries_quantised:
        carried = _Experts(block, new_gate.to(dtype), new_up.to(dtype), original.down)
    del new_gate, new_up
    down_wanted = any_wanted(job.outputs, down.names)
    moments = _hidden_moments(job, original, full=needs_inputs(job.outputs, down.names)) if down_wanted else None
    hidden = [_hidden(job, routes, carried, original, tokens[i], i, moments) for i in range(len(experts))]
    if moments is not None:
        stats = moments.stats()
        _note_expert_importance(job, (down,), stats)
        batches = quantize_linears(
            job.outputs,
            (down,),
            stats,
            job.deliver,
            lambda own, method: shrunk_to_diagonal(own, method.shrinkage[1]),
        )
        if job.weights.carries_quantised:
            (new_down,) = _decoded(batches, (down,))
            carried = replace(carried, down=new_down.to(dtype))
        del stats, moments
    for i, expert in enumerate(experts):
        _carry_on(job, routes, expert, tokens[i], hidden[i], carried.down[i])
        for stream in routes.streams[1:]:
            own = {block.gates[expert]: original.gate[i], block.ups[expert]: original.up[i]}
            own[block.downs[expert]] = original.down[i]
            forward_expert(block, own.__getitem__, expert, stream.tokens, stream.x, stream.h, job.device)


def _note_expert_importance(job: LayerJob, group: tuple[Linears, ...], stats: Inputs) -> None:
    for output in job.outputs:
        for linears in group:
            for name, row, n_tokens in zip(linears.names, stats.importance, stats.n_tokens, strict=True):
                if output.sink.wants_importance(name):
                    output.sink.write_importance(name, row.unsqueeze(0), (n_tokens,))


def _decoded(batches: tuple[QuantizedBatch | None, ...], originals: tuple[Linears, ...]) -> list[Tensor]:
    """(B, out, in) float32 each: what the first output made of a linear, or the original where it keeps it."""
    return [
        linears.weight if batch is None else batch.decode() for batch, linears in zip(batches, originals, strict=True)
    ]


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


def _tokens_for_statistics(routes: _Routes, expert: int) -> _Chosen:
    own, share = routes.streams[0].tokens.of_expert(expert)
    borrowed = routes.borrowed[expert]
    token, order = torch.cat([own, borrowed]).sort()
    return _Chosen(token, torch.cat([share, share.new_zeros(len(borrowed))])[order])


def _input_stats(job: LayerJob, routes: _Routes, tokens: tuple[_Chosen, ...], *, full: bool) -> Inputs:
    """Moments of what each expert of a batch reads, (B, hidden, hidden)."""
    width, cross = routes.streams[0].h.width, len(routes.streams) > 1
    moments = InputMoments(width, cross=cross, device=job.device, matrices=len(tokens), full=full)
    for number, chosen in enumerate(tokens):
        for part, _ in chosen.chunks(job.device):
            moments.add(*_gather(job, routes, part), number)
    return moments.stats()


@dataclass(frozen=True, slots=True)
class _Experts:
    """The weights that a stream computes with in a batch of experts: gate and up (B, inter, hidden), down (B, hidden,
    inter)."""

    block: ExpertBlock
    gate: Tensor
    up: Tensor
    down: Tensor

    def hidden(self, number: int, h: Tensor) -> Tensor:
        """h (tokens, hidden) -> (tokens, inter) of one expert."""
        return expert_hidden(self.block, self.gate[number], self.up[number], h)


def _hidden_moments(job: LayerJob, experts: _Experts, *, full: bool) -> InputMoments:
    """Empty sums for what each down projection reads, (B, inter, inter)."""
    count, inter, _ = experts.gate.shape
    cross = len(job.hidden.stores()) > 1
    return InputMoments(inter, cross=cross, device=job.device, matrices=count, full=full)


def _hidden(
    job: LayerJob,
    routes: _Routes,
    carried: _Experts,
    original: _Experts,
    tokens: _Chosen,
    number: int,
    moments: InputMoments | None,
) -> list[Tensor]:
    """What one expert's down projection reads in the carried stream, chunk by chunk of its tokens, and its moments."""
    parts: list[Tensor] = []
    for part, _ in tokens.chunks(job.device):
        h, other = _gather(job, routes, part)
        parts.append(carried.hidden(number, h))
        if moments is not None:
            moments.add(parts[-1], None if other is None else original.hidden(number, other), number)
    return parts


def _carry_on(job: LayerJob, routes: _Routes, expert: int, tokens: _Chosen, hidden: list[Tensor], down: Tensor) -> None:
    """Add an expert's output to the residual of the carried stream."""
    for (part, share), inputs in zip(tokens.chunks(job.device), hidden, strict=True):
        add_expert_output(inputs, down, part, share, routes.streams[0].x)


def _gather(job: LayerJob, routes: _Routes, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The block's inputs of some tokens in the stream that is carried and, if there is one, in the original stream."""
    parts = [stream.h.gather(tokens).to(job.device) for stream in routes.streams]
    return parts[0], parts[1] if len(parts) > 1 else None
