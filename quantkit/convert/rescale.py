"""Lets methods rescale input channels before codes are chosen, a sublayer at a time (see
`quantkit.quantizers.rescaling`).

What a sublayer's linears read is measured once with the weights as they are, for every producer that some output's
method may fold into. A norm may have hundreds of experts as readers, each of which sees tokens of its own: a method is
given their weights batch by batch, as often as it asks for them. Experts' hidden units follow when their batch is at
hand (`quantkit.convert.experts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, InputGroup, Producer, Stage, Sublayer
from quantkit.calibrate.chunk_sizes import row_slices
from quantkit.calibrate.inputs import InputImportance, InputMoments, combined
from quantkit.calibrate.stream import row_batches
from quantkit.convert.expert_batches import chosen, expert_batches, linears_of
from quantkit.convert.folding import asked, rescaled_by, with_rescaled
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import OutputChoice
from quantkit.convert.routing import Routes
from quantkit.quantizers.rescaling import ChannelReader, Channels, Rescaled, RescalingMethod

Routed = Sequence[tuple[ExpertBlock, Routes]]


def rescale_sublayer(job: LayerJob, sublayer: Sublayer, routed: Routed) -> LayerJob:
    """Ask the methods for factors of everything that the sublayer's blocks read, but for experts' hidden units. The
    same job if no method may rescale anything."""
    inputs = dict(_inputs_of(job, sublayer))
    if not inputs:
        return job
    own = [_OwnInputs(block, _inputs_of_experts(job, block, routes)) for block, routes in routed]
    outputs: list[OutputChoice] = []
    for output in job.outputs:
        rescaled: list[Rescaled] = []
        for producer, stats in inputs.items():
            method = rescaled_by(output, producer, job.weights.parts_of)
            if method is not None:
                readers = _Readers(job, output, producer, stats, sublayer, own)
                rescaled += _rescaled(job, method, Channels((producer,), stats, readers))
        outputs.append(with_rescaled(output, rescaled))
    return replace(job, outputs=tuple(outputs))


def _rescaled(job: LayerJob, method: RescalingMethod, channels: Channels) -> Iterator[Rescaled]:
    """What a method makes of channels, as near as their producers can store it."""
    for one in asked(method, channels):
        yield replace(one, factors=one.producer.storable(one.factors, job.weights.from_source))


@dataclass(frozen=True, slots=True)
class _OwnInputs:
    """What each expert of a block reads, over the tokens that it sees: (experts, hidden)."""

    block: ExpertBlock
    inputs: InputImportance


@dataclass(frozen=True, slots=True)
class _Readers:
    """What an output quantises of the linears that read a producer's channels. ``stats``: of the inputs over all
    tokens."""

    job: LayerJob
    output: OutputChoice
    producer: Producer
    stats: InputImportance
    sublayer: Sublayer
    routed: Sequence[_OwnInputs]

    def __call__(self) -> Iterator[ChannelReader]:
        """The dense ones, then the experts'."""
        for block in self.sublayer:
            for stage in block.stages if isinstance(block, DenseBlock) else ():
                for group in stage.groups:
                    if group.producer == self.producer:
                        yield from self._dense(group)
        batches = list(self._batches())
        self.job.weights.expect([name for names, experts, _ in batches for name in chosen(names, experts)])
        for names, experts, own in batches:
            scheme, _ = self.output.methods[names[experts[0]]]
            weight = linears_of(self.job, names, experts).weight
            yield ChannelReader(scheme, weight, own.inputs.matrices(experts[0], experts[-1] + 1))

    def _dense(self, group: InputGroup) -> Iterator[ChannelReader]:
        for name in group.linears:
            if name in self.output.methods:
                weight = self.job.weights.read(name)
                yield ChannelReader(self.output.methods[name][0], weight.reshape(1, -1, weight.shape[-1]), self.stats)

    def _batches(self) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], _OwnInputs]]:
        """The names of a projection, and the experts of one batch."""
        for own in self.routed:
            if own.block.producer == self.producer:
                for experts in expert_batches(self.job, own.block):
                    for names in (own.block.gates, own.block.ups):
                        if names[experts[0]] in self.output.methods:
                            yield names, experts, own


def _inputs_of_experts(job: LayerJob, block: ExpertBlock, routes: Routes) -> InputImportance:
    """Of what each expert reads, over its own tokens and those that it borrows, as its method will see them."""
    found = routes.calibrated(tuple(range(block.n_experts)))
    sums = InputMoments(found.rows.width, cross=False, device=job.device, matrices=block.n_experts, full=False)
    for number, tokens in enumerate(found.tokens):
        for token, _ in tokens.chunks(job.device):
            sums.add(found.rows.gather(token).to(job.device), None, number)
    return sums.importance()


def _inputs_of(job: LayerJob, sublayer: Sublayer) -> Iterator[tuple[Producer, InputImportance]]:
    """Of what each producer makes that some output's method may fold into, over all tokens."""
    seen: set[Producer] = set()
    for block in sublayer:
        for stage in _stages(block):
            producers = [group.producer for group in stage.groups]
            wanted = {one for one in producers if one is not None and one not in seen and _may_rescale(job, one)}
            if wanted:
                seen |= wanted
                moments = combined(_moments(job, stage, rows) for rows in row_slices(job.hidden.x.n_rows))
                for producer, sums in zip(producers, moments, strict=True):
                    if producer is not None and producer in wanted:
                        yield producer, sums.importance()


def _stages(block: Block) -> tuple[Stage, ...]:
    """The stages of a dense block; for routed experts one, whose inputs are what they read."""
    return block.stages if isinstance(block, DenseBlock) else (_expert_stage(block),)


def _expert_stage(block: ExpertBlock) -> Stage:
    return Stage(
        (InputGroup((*block.gates, *block.ups), block.producer),), lambda weights, x: (block.inputs(weights, x),)
    )


def _may_rescale(job: LayerJob, producer: Producer) -> bool:
    return any(rescaled_by(output, producer, job.weights.parts_of) is not None for output in job.outputs)


def _moments(job: LayerJob, stage: Stage, rows: tuple[int, int]) -> list[InputMoments]:
    """Of the inputs of each group, over one slice of rows."""
    moments: list[InputMoments] = []
    for start, stop in row_batches(job.hidden.x, job.device, rows):
        inputs: tuple[Tensor, ...] = stage.inputs(job.weights.carried, job.hidden.x.read(start, stop).to(job.device))
        moments = moments or [InputMoments.like(x, cross=False, full=False) for x in inputs]
        for sums, x in zip(moments, inputs, strict=True):
            sums.add(x, None)
    return moments
