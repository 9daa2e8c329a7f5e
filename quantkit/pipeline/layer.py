"""One decoder layer: calibrate, quantise, write and carry the hidden states on.

Dense blocks: stage by stage over batches of rows, each stage's statistics taken with the earlier stages' quantised
weights.
Routed experts: expert-major. The layer's tokens are routed once and sorted by expert; then, a batch of experts at a
time: gather tokens, moments, quantise gate and up together, hidden from the *quantised* gate and up, quantise down, add
to the residual. A layer's Hessians never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, InputGroup, Sublayer
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputImportance, InputMoments, Inputs, shrunk, shrunk_to_diagonal, stacked
from quantkit.calibrate.portions import EXPERT_CHUNK
from quantkit.calibrate.stream import ExpertTokens, expert_hidden, forward_expert, row_batches
from quantkit.pipeline.hidden import Streams
from quantkit.pipeline.outputs import Linears, OutputJob, any_quantised, any_wanted, needs_inputs, quantize_linears
from quantkit.pipeline.weights import LayerWeights
from quantkit.quantizers.batch import QuantizedBatch
from quantkit.schemes import QuantizedTensor


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
    ``streams`` is None in a data-free conversion. ``experts_at_once``: how many experts of one shape are one batch.
    ``importance(names)``: what an imatrix file knows of the inputs of linears of one shape, on the device, for
    conversions without streams.
    """

    outputs: tuple[OutputJob, ...]
    weights: LayerWeights
    streams: Streams | None
    new_rows: Callable[[int], RowStore]
    on_tensor: Callable[[int, QuantizedTensor], None]
    on_stage: Callable[[str, int], None]
    device: torch.device
    experts_at_once: int
    min_expert_tokens: int
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
    for block in blocks:
        if isinstance(block, DenseBlock):
            for name in (name for stage in block.stages for group in stage.groups for name in group.linears):
                _quantize_group(job, InputGroup((name,)), job.importance((name,)))
            job.weights.forget()
            continue
        for experts in _expert_batches(job, block):
            for names in (block.gates, block.ups, block.downs):
                linears = _linears(job, names, experts)
                quantize_linears(job.outputs, (linears,), job.importance(linears.names), job.on_tensor)


# Dense blocks


def _quantize_dense(job: LayerJob, block: DenseBlock) -> None:
    stores = job.hidden.stores()
    width = job.weights.shape(block.output)[1]
    contexts = tuple(job.new_rows(width) for _ in stores)
    for stage in block.stages:
        last = stage is block.stages[-1]
        needed = any(any_wanted(job.outputs, group.linears) for group in stage.groups)
        if not (needed or last):
            continue
        moments: list[InputMoments] | None = None
        for start, stop in row_batches(job.hidden.x):
            inputs = [
                stage.inputs(weights, store.read(start, stop).to(job.device))
                for weights, store in zip(job.weights.by_stream(len(stores)), stores, strict=True)
            ]
            if moments is None:
                moments = [
                    InputMoments.like(x, cross=len(stores) > 1, full=needs_inputs(job.outputs, group.linears))
                    for x, group in zip(inputs[0], stage.groups, strict=True)
                ]
            for number, group in enumerate(moments):
                if needed:
                    group.add(inputs[0][number], inputs[1][number] if len(inputs) > 1 else None)
            if last:
                for context, stream_inputs in zip(contexts, inputs, strict=True):
                    context.write(start, stream_inputs[0])
        assert moments is not None
        for group, sums in zip(stage.groups, moments, strict=True):
            _quantize_group(job, group, sums.stats())
    for weights, store, context in zip(job.weights.by_stream(len(stores)), stores, contexts, strict=True):
        _add_output(weights(block.output), store, context)
        context.close()
    job.weights.forget()


def _quantize_group(job: LayerJob, group: InputGroup, stats: Inputs | None) -> None:
    if stats is not None:
        _note_importance(job, group.linears, stats)
    names = tuple(name for name in group.linears if any_quantised(job.outputs, (name,)))
    if not names:
        return
    batch = 1 if stats is None else len(stats.importance)
    linears = tuple(Linears((name,), _in_matrices(job.weights.read(name), batch)) for name in names)
    for name, result in zip(names, quantize_linears(job.outputs, linears, stats, job.on_tensor), strict=True):
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
    for start, stop in row_batches(store):
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
    nearest = _Nearest(block.n_experts, job.min_expert_tokens)
    chosen: list[list[Tensor]] = [[] for _ in stores]
    gates: list[list[Tensor]] = [[] for _ in stores]
    for start, stop in row_batches(job.hidden.x):
        batch: list[Tensor] = []
        for number, (weights, store) in enumerate(zip(job.weights.by_stream(len(stores)), stores, strict=True)):
            h = block.inputs(weights, store.read(start, stop).to(job.device))
            routing = block.route(weights, h)
            inputs_of[number].write(start, h)
            chosen[number].append(routing.indices.cpu())
            gates[number].append(routing.weights.cpu())
            if number == 0:
                nearest.add(start * store.length, routing.scores.cpu(), routing.indices.cpu())
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

    def __init__(self, n_experts: int, keep: int) -> None:
        self._keep = keep
        self._scores = torch.full((n_experts, 0), -torch.inf)
        self._tokens = torch.zeros(n_experts, 0, dtype=torch.int64)

    def add(self, first_token: int, scores: Tensor, chosen: Tensor) -> None:
        """scores (tokens, experts), chosen (tokens, top_k): a batch that begins at token ``first_token``."""
        others = scores.scatter(1, chosen, -torch.inf).T
        numbers = torch.arange(first_token, first_token + len(scores)).expand(others.shape)
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
    return Linears(chosen, torch.stack([job.weights.read(name) for name in chosen]))


def _quantize_expert_batch(job: LayerJob, block: ExpertBlock, routes: _Routes, experts: tuple[int, ...]) -> None:
    gate, up, down = (_linears(job, names, experts) for names in (block.gates, block.ups, block.downs))
    tokens = tuple(_tokens_for_statistics(routes, expert) for expert in experts)
    if any_wanted(job.outputs, (gate.names[0], up.names[0])):
        stats = _input_stats(job, routes, tokens, full=needs_inputs(job.outputs, (gate.names[0], up.names[0])))
        _note_expert_importance(job, (gate, up), stats)
        batches = quantize_linears(
            job.outputs,
            (gate, up),
            stats,
            job.on_tensor,
            lambda own, method: shrunk(own, routes.pooled, method.shrinkage[0]),
        )
        new_gate, new_up = _decoded(batches, (gate, up))
        del stats
    else:
        new_gate, new_up = gate.weight, up.weight
    new_down = down.weight
    if any_wanted(job.outputs, down.names):
        hidden = _HiddenOf(block, (new_gate, new_up), (gate.weight, up.weight))
        stats = _hidden_stats(job, routes, tokens, hidden, full=needs_inputs(job.outputs, down.names))
        _note_expert_importance(job, (down,), stats)
        batches = quantize_linears(
            job.outputs,
            (down,),
            stats,
            job.on_tensor,
            lambda own, method: shrunk_to_diagonal(own, method.shrinkage[1]),
        )
        (new_down,) = _decoded(batches, (down,))
    for position, expert in enumerate(experts):
        parts = ((new_gate, new_up, new_down), (gate.weight, up.weight, down.weight))
        for stream, (g, u, d) in zip(
            routes.streams, parts if job.weights.carries_quantised else parts[::-1], strict=False
        ):
            own = {block.gates[expert]: g[position], block.ups[expert]: u[position], block.downs[expert]: d[position]}
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


def _tokens_for_statistics(routes: _Routes, expert: int) -> Tensor:
    own, _ = routes.streams[0].tokens.of_expert(expert)
    return torch.cat([own, routes.borrowed[expert]]).sort().values


def _input_stats(job: LayerJob, routes: _Routes, tokens: tuple[Tensor, ...], *, full: bool) -> Inputs:
    """Moments of what each expert of a batch reads, (B, hidden, hidden)."""
    width, cross = routes.streams[0].h.width, len(routes.streams) > 1
    sums = [InputMoments(width, cross=cross, device=job.device, full=full) for _ in tokens]
    for moments, chosen in zip(sums, tokens, strict=True):
        for part in chosen.split(EXPERT_CHUNK):
            moments.add(*_gather(job, routes, part))
    return stacked([moments.stats() for moments in sums])


@dataclass(frozen=True, slots=True)
class _HiddenOf:
    """Gate and up of a batch of experts, (B, inter, hidden) each: quantised and original."""

    block: ExpertBlock
    quantised: tuple[Tensor, Tensor]
    original: tuple[Tensor, Tensor]


def _hidden_stats(
    job: LayerJob, routes: _Routes, tokens: tuple[Tensor, ...], weights: _HiddenOf, *, full: bool
) -> Inputs:
    """Moments of what each expert's down projection reads, (B, inter, inter)."""
    inter, cross = weights.original[0].shape[-2], len(routes.streams) > 1
    sums = [InputMoments(inter, cross=cross, device=job.device, full=full) for _ in tokens]
    carried = weights.quantised if job.weights.carries_quantised else weights.original
    for i, (moments, chosen) in enumerate(zip(sums, tokens, strict=True)):
        for part in chosen.split(EXPERT_CHUNK):
            h, original = _gather(job, routes, part)
            hidden = expert_hidden(weights.block, carried[0][i], carried[1][i], h)
            other = None
            if original is not None:
                other = expert_hidden(weights.block, weights.original[0][i], weights.original[1][i], original)
            moments.add(hidden, other)
    return stacked([moments.stats() for moments in sums])


def _gather(job: LayerJob, routes: _Routes, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The block's inputs of some tokens in the stream that is carried and, if there is one, in the original stream."""
    parts = [stream.h.gather(tokens).to(job.device) for stream in routes.streams]
    return parts[0], parts[1] if len(parts) > 1 else None
