"""Lets methods rescale input channels before codes are chosen, a sublayer at a time (see
`quantkit.quantizers.rescaling`).

What a sublayer's linears read is measured once with the weights as they are, for every producer that some output's
method may fold into. The hidden units of routed experts follow when their batch is at hand (`rescale_hidden`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, InputGroup, Producer, Stage, Sublayer
from quantkit.calibrate.chunk_sizes import row_slices
from quantkit.calibrate.inputs import InputMoments, Inputs, combined
from quantkit.calibrate.stream import row_batches
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import OutputChoice, copied
from quantkit.quantizers.rescaling import Channels, Rescaled, RescalingMethod

PartsOf = Callable[[str], tuple[str, ...]]
"""A linear's name -> it, and the names of its parts."""


def alone(name: str) -> tuple[str, ...]:
    """The linear without parts."""
    return (name,)


def rescaled_by(output: OutputChoice, producer: Producer, parts_of: PartsOf) -> RescalingMethod | None:
    """The method of an output that may rescale the inputs of a producer's readers, None if there is none.

    All linears that read them must be left to that one method, and every tensor that would change must be written anew.
    """
    named = [name for reader in producer.readers for name in parts_of(reader)]
    methods = {output.methods[name][1] for name in named if name in output.methods}
    if len(methods) != 1 or not output.verbatim.isdisjoint((producer.tensor, *producer.readers)):
        return None
    (method,) = methods
    return method if isinstance(method, RescalingMethod) else None


def with_rescaled(output: OutputChoice, rescaled: Sequence[Rescaled]) -> OutputChoice:
    """The output with more of its channels rescaled."""
    return replace(output, folding=output.folding.extended(rescaled)) if rescaled else output


def rescale_sublayer(job: LayerJob, sublayer: Sublayer) -> LayerJob:
    """Ask the methods for factors of everything that the sublayer's blocks read, but for experts' hidden units."""
    inputs = dict(_inputs_of(job, sublayer))
    if not inputs:
        return job
    outputs: list[OutputChoice] = []
    for output in job.outputs:
        rescaled: list[Rescaled] = []
        for producer, stats in inputs.items():
            method = rescaled_by(output, producer, job.weights.parts_of)
            if method is not None:
                rescaled += _asked(method, output, producer, stats, job.weights.parts_of, job.weights.original)
        outputs.append(with_rescaled(output, rescaled))
    return replace(job, outputs=tuple(outputs))


def _asked(
    method: RescalingMethod,
    output: OutputChoice,
    producer: Producer,
    stats: Inputs,
    parts_of: PartsOf,
    weight: Callable[[str], Tensor],
) -> list[Rescaled]:
    """What a method makes of one producer's channels: nothing, or one rescaling."""
    linears = tuple(name for name in producer.readers if any(part in output.methods for part in parts_of(name)))
    factors = method.rescale(Channels(producer, copied(stats), linears, lambda name: weight(name).float()))
    return [] if factors is None else [Rescaled(producer, factors)]


def rescale_hidden(
    output: OutputChoice, producers: Sequence[Producer], stats: Inputs, weight: Callable[[str], Tensor]
) -> tuple[Rescaled, ...]:
    """Ask a method for factors of the hidden units of some experts. ``stats``: (B, inter), of each of them."""
    found: list[Rescaled] = []
    for number, producer in enumerate(producers):
        method = rescaled_by(output, producer, alone)
        if method is not None:
            found += _asked(method, output, producer, stats.of(number), alone, weight)
    return tuple(found)


def _inputs_of(job: LayerJob, sublayer: Sublayer) -> Iterator[tuple[Producer, Inputs]]:
    """Statistics of what each producer makes that some output's method may fold into."""
    seen: set[Producer] = set()
    for block in sublayer:
        for stage in _stages(block):
            producers = [group.producer for group in stage.groups]
            wanted = {one for one in producers if one is not None and one not in seen and _methods(job, one)}
            if wanted:
                seen |= wanted
                moments = combined(_moments(job, stage, rows) for rows in row_slices(job.hidden.x.n_rows))
                for producer, sums in zip(producers, moments, strict=True):
                    if producer is not None and producer in wanted:
                        yield producer, sums.stats()


def _stages(block: Block) -> tuple[Stage, ...]:
    """The stages of a dense block; for routed experts one, whose inputs are what they read."""
    return block.stages if isinstance(block, DenseBlock) else (_expert_stage(block),)


def _expert_stage(block: ExpertBlock) -> Stage:
    return Stage(
        (InputGroup((*block.gates, *block.ups), block.producer),), lambda weights, x: (block.inputs(weights, x),)
    )


def _methods(job: LayerJob, producer: Producer) -> list[RescalingMethod]:
    found = (rescaled_by(output, producer, job.weights.parts_of) for output in job.outputs)
    return [method for method in found if method is not None]


def _moments(job: LayerJob, stage: Stage, rows: tuple[int, int]) -> list[InputMoments]:
    """Whole second moments of the inputs of each group, over one slice of rows."""
    moments: list[InputMoments] = []
    for start, stop in row_batches(job.hidden.x, job.device, rows):
        inputs = stage.inputs(job.weights.carried, job.hidden.x.read(start, stop).to(job.device))
        moments = moments or [InputMoments.like(x, cross=False) for x in inputs]
        for sums, x in zip(moments, inputs, strict=True):
            sums.add(x, None)
    return moments
