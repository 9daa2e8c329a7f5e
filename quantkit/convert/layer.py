"""One decoder layer: calibrate, quantise, hand over, and carry the hidden states on.

The work itself is `quantize_group` and `quantize_experts`, which change nothing. Here their tasks are made, and their
results applied in the order of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, InputGroup, Sublayer
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.convert.dense import GroupTask, apply_group, group_task, quantize_dense, quantize_group
from quantkit.convert.exchange import ExchangedBatch, JointTokens, rounds_of
from quantkit.convert.expert_batches import chosen, expert_batches, joint_dtype, linears_of, own_expert_batches
from quantkit.convert.experts import ExpertOutputs, ExpertsResult, ExpertsTask, quantize_experts
from quantkit.convert.folding import with_rescaled
from quantkit.convert.layer_job import LayerJob, LayerSink, begin_block, hand_over
from quantkit.convert.output_hessians import ExpertHessians, SublayerHessians
from quantkit.convert.outputs import Linears, any_quantised, output_aware, reach_of
from quantkit.convert.rescale import rescale_sublayer
from quantkit.convert.routing import Routes, route
from quantkit.documents.journal import ExpertRecord, TuningRecord
from quantkit.quantizers.rescaling import Folding
from quantkit.ranks.shares import shared_out


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What is known of a layer beside its linears. ``experts``: what the router gave each, by block;
    ``foldings``: by output, the input channels that its methods rescaled, which kept tensors absorb; ``changed``: kept
    tensors that every output stores otherwise than the source, by name; ``tuning``: what it did, None if it was not
    asked for."""

    experts: dict[str, tuple[ExpertRecord, ...]] = field(default_factory=dict[str, tuple[ExpertRecord, ...]])
    foldings: tuple[Folding, ...] = ()
    changed: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    tuning: TuningRecord | None = None


def quantize_layer(job: LayerJob, sublayers: tuple[Sublayer, ...], sink: LayerSink) -> LayerResult:
    """Quantise every linear of the layer that some output quantises, hand it to ``sink``, and carry the streams through
    the layer in place."""
    expected: list[str] = []
    if job.ranks.count == 1:  # else who reads which is known when tokens are routed
        batches = list(_expert_weights(job, (block for sublayer in sublayers for block in sublayer)))
        expected = [name for names, experts in batches for name in chosen(names, experts)]
    job.weights.expect(expected)
    found = LayerResult()
    for number, sublayer in enumerate(sublayers):
        aware = any(output_aware(job.outputs, block.linears) for block in sublayer)
        gradients = job.gradients if aware else None
        with nullcontext() if gradients is None else gradients.sublayer(number) as hessians:
            job = _quantize_sublayer(job, sublayer, sink, found, expected, hessians)
    return replace(found, foldings=tuple(output.folding for output in job.outputs))


def _quantize_sublayer(
    job: LayerJob,
    sublayer: Sublayer,
    sink: LayerSink,
    found: LayerResult,
    expected: Sequence[str],
    hessians: SublayerHessians | None,
) -> LayerJob:
    """As `quantize_layer`, one sublayer. ``expected``: weights of experts that are read ahead. Adds to ``found`` what
    its routers did. Returns the job with what was rescaled."""
    # Blocks of a sublayer read the same x. The routed experts keep their inputs, so the dense block may add to x first.
    with ExitStack() as stack:
        routed = [
            (block, stack.enter_context(closing(route(job, block))))
            for block in sublayer
            if isinstance(block, ExpertBlock)
        ]
        if job.ranks.count > 1:
            job.weights.expect([name for block, routes in routed for name in _own_weights(job, block, routes)])
        rescaled = rescale_sublayer(job, sublayer, routed)
        if rescaled is not job and routed:
            rescaled.weights.expect(expected)  # the search has read what was read ahead
        job = rescaled
        dense = [block for block in sublayer if isinstance(block, DenseBlock)]
        assert len(dense) <= 1, "a second dense block would read what the first has added"
        for block in dense:
            begin_block(job, sink, block)
            quantize_dense(job, block, sink, hessians)
        for block, routes in routed:
            begin_block(job, sink, block)
            found.experts[block.name] = routes.counts()
            found.changed.update(routes.changed)
            if job.ranks.count > 1:
                _quantize_on_ranks(job, block, routes, sink)
            else:
                job = _quantize_routed(job, block, routes, sink, hessians)
    return job


def _quantize_routed(
    job: LayerJob, block: ExpertBlock, routes: Routes, sink: LayerSink, hessians: SublayerHessians | None
) -> LayerJob:
    aware = hessians is not None and output_aware(job.outputs, block.linears)
    with closing(hessians.of_experts(block)) if hessians is not None and aware else nullcontext() as of_outputs:
        for experts in expert_batches(job, block):
            # Neither task nor result has a name here: both are free before the next batch is read.
            job = _apply_experts(job, quantize_experts(_experts_task(job, block, routes, experts, of_outputs)), sink)
    return job


def _quantize_on_ranks(job: LayerJob, block: ExpertBlock, routes: Routes, sink: LayerSink) -> None:
    """As `_quantize_routed` on several ranks, in rounds: see `quantkit.convert.exchange`."""
    joint, inputs = JointTokens.of(job, block, routes), [stream.inputs for stream in routes.streams]
    for turn in rounds_of(job, block, routes.token_counts()):
        dtype = joint_dtype(job, chosen(block.downs, tuple(expert for owned in turn for expert in owned)))
        batch, result = ExchangedBatch.fetched(job, joint, turn, inputs, dtype), None
        if batch.experts:
            task = _experts_task(job, block, routes, batch.experts)
            result = quantize_experts(replace(task, calibrated=batch.calibrated, unquantised=batch.unquantised))
            del task
            hand_over(sink, result.quantised, result.importance)
        batch.add(0, None if result is None else result.calibrated)
        if len(inputs) > 1:
            batch.add(1, None if result is None else result.unquantised)
        del batch, result  # before the next round's exist


def _own_weights(job: LayerJob, block: ExpertBlock, routes: Routes) -> Iterator[str]:
    """Weights of this rank's experts, in the order in which they are read."""
    for turn in rounds_of(job, block, routes.token_counts()):
        for names in (block.gates, block.ups, block.downs):
            yield from chosen(names, turn[job.ranks.number])


def quantize_without_inputs(
    job: LayerJob, blocks: tuple[Block, ...], sink: LayerSink, importance: ImportanceFile | None
) -> None:
    """Quantise every linear of the layer alone, without hidden states. ``importance``: an imatrix file that knows
    something of their inputs."""
    batches = [
        (names, experts)
        for names, experts in _expert_weights(job, blocks, own_expert_batches)
        if any_quantised(job.outputs, chosen(names, experts))
    ]
    job.weights.expect([name for names, experts in batches for name in chosen(names, experts)])
    joined = _joined(blocks)
    for block in blocks:
        if isinstance(block, DenseBlock):
            begin_block(job, sink, block)
            for name in _own_linears(job, block):
                stats = None if importance is None else importance.of((name,), job.device)
                task = group_task(job, InputGroup((name,)), stats)
                task = replace(task, linears=tuple(_with_reach(job, one, joined) for one in task.linears))
                apply_group(job, quantize_group(task), sink)
            job.weights.forget()
    expert_block = next((block for block in blocks if isinstance(block, ExpertBlock)), None)
    if expert_block is not None:
        begin_block(job, sink, expert_block)
    for names, experts in batches:
        linears = _with_reach(job, linears_of(job, names, experts), joined)
        stats = None if importance is None else importance.of(linears.names, job.device)
        result = quantize_group(GroupTask((linears,), (), stats, job.outputs))
        hand_over(sink, result.quantised, result.importance)


def _own_linears(job: LayerJob, block: DenseBlock) -> Sequence[str]:
    """This rank's share of a block's linears, by their weights."""
    if job.ranks.count == 1:
        return block.linears
    sizes = [math.prod(job.weights.shape(job.weights.whole_of(name))) for name in block.linears]
    owners = shared_out(sizes, job.ranks.count)
    return [name for name, owner in zip(block.linears, owners, strict=True) if owner == job.ranks.number]


def _joined(blocks: Iterable[Block]) -> dict[str, tuple[str, ...]]:
    """Linear -> all that read the same as it, which runtimes join."""
    groups: list[tuple[str, ...]] = []
    for block in blocks:
        if isinstance(block, ExpertBlock):
            groups += zip(block.gates, block.ups, strict=True)
        else:
            groups += [group.linears for stage in block.stages for group in stage.groups]
    return {name: group for group in groups for name in group}


def _with_reach(job: LayerJob, linears: Linears, joined: Mapping[str, tuple[str, ...]]) -> Linears:
    """The linears, quantised without those that share a scale with them, with how far all of these reach."""
    methods = (output.methods.get(linears.names[0]) for output in job.outputs)
    if not any(chosen is not None and chosen[0].shares_scale for chosen in methods):
        return linears
    reach = reach_of(linears.weight)
    for place, name in enumerate(linears.names):
        for other in joined.get(name, ()):
            if other != name and any_quantised(job.outputs, (other,)):
                weight = job.weights.read(other)
                reach[place] = torch.maximum(reach[place], reach_of(weight.unsqueeze(0))[0])
    return replace(linears, reach=reach)


def _experts_task(
    job: LayerJob,
    block: ExpertBlock,
    routes: Routes,
    experts: tuple[int, ...],
    of_outputs: ExpertHessians | None = None,
) -> ExpertsTask:
    inputs = () if block.producer is None else (block.producer,)
    hidden = tuple(block.down_producers[expert] for expert in experts) if block.down_producers else ()
    gate, up = (replace(linears_of(job, names, experts), producers=inputs) for names in (block.gates, block.ups))
    down = replace(linears_of(job, block.downs, experts), producers=hidden, to_residual=True)
    if of_outputs is not None and output_aware(job.outputs, (gate.names[0], up.names[0], down.names[0])):
        gate, up, down = _with_output_hessians(of_outputs, experts, gate, up, down)
    return ExpertsTask(
        gate=gate,
        up=up,
        down=down,
        activate=block.activate,
        outputs=job.outputs,
        calibrated=routes.calibrated(experts),
        unquantised=routes.unquantised(experts),
        pooled=routes.pooled,
        carries_quantised=job.weights.carries_quantised,
    )


def _with_output_hessians(
    known: ExpertHessians, experts: tuple[int, ...], gate: Linears, up: Linears, down: Linears
) -> tuple[Linears, Linears, Linears]:
    weights = {
        name: one for linears in (gate, up, down) for name, one in zip(linears.names, linears.weight, strict=True)
    }
    of_gate, of_up = known.of_gate_up(experts, weights)
    return (
        replace(gate, output_factor=of_gate),
        replace(up, output_factor=of_up),
        replace(down, output_factor=known.down),
    )


def _apply_experts(job: LayerJob, result: ExpertsResult, sink: LayerSink) -> LayerJob:
    """Hand over what the outputs store of a batch of experts, and carry the streams through it. Returns the job with
    what was rescaled."""
    # In this order packing on a GPU overlaps with the residual's change, not with the next batch: 2 % of a V3 layer.
    hand_over(sink, result.quantised, result.importance)
    _add_outputs(job.hidden.x, result.calibrated)
    if result.unquantised is not None and job.hidden.original is not None:
        _add_outputs(job.hidden.original, result.unquantised)
    if not any(result.rescaled):
        return job
    pairs = zip(job.outputs, result.rescaled, strict=True)
    return replace(job, outputs=tuple(with_rescaled(output, more) for output, more in pairs))


def _add_outputs(store: RowStore, outputs: ExpertOutputs) -> None:
    for change in outputs.changes():
        store.add(change.tokens, change.values, change.shares)
        del change  # before the next one is made


def _expert_weights(
    job: LayerJob,
    blocks: Iterable[Block],
    batches: Callable[[LayerJob, ExpertBlock], Iterable[tuple[int, ...]]] = expert_batches,
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """A projection's names and the experts of one batch, in the order in which their weights are read."""
    for block in blocks:
        if isinstance(block, ExpertBlock):
            for experts in batches(job, block):
                yield from ((names, experts) for names in (block.gates, block.ups, block.downs))
