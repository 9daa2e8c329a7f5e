"""One decoder layer: calibrate, quantise, hand over and carry the hidden states on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, InputGroup, Sublayer
from quantkit.convert.dense import quantize_dense, quantize_group
from quantkit.convert.experts import expert_batches, linears_of, quantize_experts, route
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import any_quantised, quantize_linears


def quantize_layer(job: LayerJob, sublayers: tuple[Sublayer, ...]) -> None:
    """Quantise and write every linear of the layer that some output quantises, and carry the streams through it in
    place."""
    batches = _expert_weights(job, (block for sublayer in sublayers for block in sublayer))
    job.expect([name for names, experts in batches for name in _chosen(names, experts)])
    for sublayer in sublayers:
        # Blocks of a sublayer read the same x. The routed experts keep their inputs, so the dense block may add to x
        # first.
        routed = [(block, route(job, block)) for block in sublayer if isinstance(block, ExpertBlock)]
        dense = [block for block in sublayer if isinstance(block, DenseBlock)]
        assert len(dense) <= 1, "a second dense block would read what the first has added"
        for block in dense:
            names = (name for stage in block.stages for group in stage.groups for name in group.linears)
            job.on_stage(block.name, sum(name in job.outputs[0].methods for name in names))
            quantize_dense(job, block)
        for block, routes in routed:
            job.on_stage(block.name, 3 * block.n_experts)
            quantize_experts(job, block, routes)


def quantize_without_inputs(job: LayerJob, blocks: tuple[Block, ...]) -> None:
    """The same for a data-free conversion: no hidden states, each linear alone."""
    batches = [
        (names, experts)
        for names, experts in _expert_weights(job, blocks)
        if any_quantised(job.outputs, _chosen(names, experts))
    ]
    job.expect([name for names, experts in batches for name in _chosen(names, experts)])
    for block in blocks:
        if isinstance(block, DenseBlock):
            for name in (name for stage in block.stages for group in stage.groups for name in group.linears):
                quantize_group(job, InputGroup((name,)), job.importance((name,)))
            job.weights.forget()
    for names, experts in batches:
        linears = linears_of(job, names, experts)
        quantize_linears(job.outputs, (linears,), job.importance(linears.names), job.deliver)


def _expert_weights(job: LayerJob, blocks: Iterable[Block]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """A projection's names and the experts of one batch, in the order in which their weights are read."""
    for block in blocks:
        if isinstance(block, ExpertBlock):
            for experts in expert_batches(job, block):
                yield from ((names, experts) for names in (block.gates, block.ups, block.downs))


def _chosen(names: tuple[str, ...], experts: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(names[expert] for expert in experts)
