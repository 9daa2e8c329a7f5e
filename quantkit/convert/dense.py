"""Dense blocks of a layer: stage by stage over batches of rows, each stage's statistics taken with the earlier stages'
quantised weights.

The unit of work is one input group: `quantize_group` turns its statistics and weights into what the outputs store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantkit.arch.base import DenseBlock, InputGroup, Stage
from quantkit.arch.ops import linear
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputMoments, Inputs
from quantkit.calibrate.stream import row_batches, sliced_batches
from quantkit.convert.layer_job import LayerJob, LayerSink, hand_over
from quantkit.convert.output_hessians import SublayerHessians
from quantkit.convert.outputs import (
    Importance,
    Linears,
    OutputChoice,
    Quantised,
    any_quantised,
    any_wanted,
    importance_of,
    needs_hessian,
    of_first_output,
    output_aware,
    quantize_linears,
)
from quantkit.convert.sums import combined_over
from quantkit.quantizers.ldlq.two_sided import OutputFactor
from quantkit.ranks.shares import shared_out


@dataclass(frozen=True, slots=True)
class GroupTask:
    """Linears that read the same. ``kept``: those whose original every output keeps, at most the importance of their
    inputs is wanted; ``linears``: the others; ``stats``: what is known of their inputs, None: nothing. The statistics
    are used up: their memory becomes that of the factor."""

    linears: tuple[Linears, ...]
    kept: tuple[str, ...]
    stats: Inputs | None
    outputs: tuple[OutputChoice, ...]


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What the outputs store of an input group."""

    quantised: tuple[Quantised, ...]
    importance: tuple[Importance, ...]


def quantize_group(task: GroupTask) -> GroupResult:
    """Quantise linears that read the same, for every output."""
    importance: tuple[Importance, ...] = ()
    if task.stats is not None:
        importance = importance_of(task.outputs, task.linears, task.stats, task.kept)
    made = quantize_linears(task.outputs, task.linears, task.stats) if task.linears else ()
    return GroupResult(made, importance)


def quantize_dense(job: LayerJob, block: DenseBlock, sink: LayerSink, hessians: SublayerHessians | None = None) -> None:
    """Quantise the block's linears stage by stage, and carry the streams through it. ``hessians``: those of its
    sublayer's outputs."""
    aware = [name for name in block.linears if output_aware(job.outputs, (name,))]
    of_outputs = hessians.of_dense(block, aware) if hessians is not None and aware else {}
    context = job.hidden.new_rows(job.weights.shape(block.output)[1])
    for stage in block.stages:
        last = stage is block.stages[-1]
        if not (last or any(any_wanted(job.outputs, group.linears) for group in stage.groups)):
            continue
        moments = _moments_of_stage(job, stage, block.output, context if last else None)
        if moments and job.ranks.count == 1:
            for group, sums in zip(stage.groups, moments, strict=True):
                task = group_task(job, group, sums.stats(), of_outputs, to_residual=(block.output,))
                apply_group(job, quantize_group(task), sink)
        elif moments:
            quantize_stage_on_ranks(job, stage, moments, sink, block.output)
    weights, *_ = job.weights.by_stream(len(job.hidden.stores()))
    _add_output(weights(block.output), job.hidden.x, context, job.hidden.rows.slices)
    context.close()
    job.weights.forget()


def group_task(
    job: LayerJob,
    group: InputGroup,
    stats: Inputs | None,
    of_outputs: Mapping[str, OutputFactor] | None = None,
    to_residual: tuple[str, ...] = (),
) -> GroupTask:
    """The work on one input group, its weights read. ``of_outputs``: factors of output Hessians by name;
    ``to_residual``: linears whose outputs are added to the residual stream."""
    batch = 1 if stats is None else len(stats.importance)
    producers = () if group.producer is None else (group.producer,)
    linears = tuple(
        Linears(
            (name,),
            _in_matrices(job.weights.read(name), batch),
            producers,
            _folded_part(job, name, batch),
            output_factor=(of_outputs or {}).get(name),
            to_residual=name in to_residual,
        )
        for name in group.linears
        if any_quantised(job.outputs, (name,))
    )
    quantised = {name for one in linears for name in one.names}
    return GroupTask(linears, tuple(name for name in group.linears if name not in quantised), stats, job.outputs)


def _folded_part(job: LayerJob, name: str, batch: int) -> dict[int, Tensor]:
    """By output, a part of a linear whose channels that output rescales; {} for what is no part."""
    whole = job.weights.whole_of(name)
    if whole == name:
        return {}
    changed = (number for number, output in enumerate(job.outputs) if output.folding.changes(whole))
    return {n: _in_matrices(job.weights.read(name, job.outputs[n].folding), batch) for n in changed}


def apply_group(job: LayerJob, result: GroupResult, sink: LayerSink) -> None:
    """Hand the results over, and let the calibrated stream compute with those of the first output."""
    hand_over(sink, result.quantised, result.importance)
    for made in of_first_output(result.quantised):
        job.weights.carry(made.names[0], made.batch, made.folding)


def quantize_stage_on_ranks(
    job: LayerJob, stage: Stage, moments: Sequence[InputMoments], sink: LayerSink, output: str
) -> None:
    """Quantise the groups of a stage, each on one rank, which hands over what the outputs store. What the calibrated
    stream computes with goes to all. ``output``: the block's linear that writes to the residual stream."""
    owners = shared_out([_work(job, group) for group in stage.groups], job.ranks.count)
    made: dict[int, tuple[Quantised, ...]] = {}
    for number, (group, sums) in enumerate(zip(stage.groups, moments, strict=True)):
        if owners[number] == job.ranks.number:
            result = quantize_group(group_task(job, group, sums.stats(), to_residual=(output,)))
            hand_over(sink, result.quantised, result.importance)
            made[number] = tuple(of_first_output(result.quantised)) if job.weights.carries_quantised else ()
    for number, owner in enumerate(owners):
        for one in job.ranks.shared(made.get(number, ()), owner):
            job.weights.carry(one.names[0], one.batch, one.folding)


def _work(job: LayerJob, group: InputGroup) -> float:
    """How long a group takes, about: what the sweep multiplies and what the factor does."""
    shapes = [job.weights.shape(job.weights.whole_of(name)) for name in group.linears]
    return float(sum(shape[0] * shape[1] ** 2 for shape in shapes) + shapes[0][1] ** 3)


def _moments_of_stage(job: LayerJob, stage: Stage, output: str, context: RowStore | None) -> list[InputMoments]:
    """The moments of each group's inputs over all rows; none if no output wants them. In the last stage ``context``
    keeps what the output projection reads of the calibrated stream, until that is quantised; the unquantised stream
    takes its own at once."""
    follows = len(job.hidden.stores()) == 2
    original_output = job.weights.original(output) if context is not None and follows else None
    slices = job.hidden.rows.slices
    own = (_moments_of_rows(job, stage, rows, original_output, context) for rows in slices)
    return combined_over(job.ranks, own)


def _moments_of_rows(
    job: LayerJob, stage: Stage, rows: tuple[int, int], original_output: Tensor | None, context: RowStore | None
) -> list[InputMoments]:
    """The moments of each group's inputs over one slice of rows, its sums from zero on; ``context`` and the unquantised
    stream take their rows."""
    stores = job.hidden.stores()
    needed = any(any_wanted(job.outputs, group.linears) for group in stage.groups)
    moments: list[InputMoments] = []
    for start, stop in row_batches(job.hidden.x, job.device, rows):
        x = [store.read(start, stop).to(job.device) for store in stores]
        own, *others = (
            stage.inputs(weights, one) for weights, one in zip(job.weights.by_stream(len(stores)), x, strict=True)
        )
        if needed and not moments:
            moments = [
                InputMoments.like(inputs, cross=bool(others), full=needs_hessian(job.outputs, group.linears))
                for inputs, group in zip(own, stage.groups, strict=True)
            ]
        for number, sums in enumerate(moments):
            sums.add(own[number], others[0][number] if others else None)
        if context is not None:
            context.write(start, own[0])
        if original_output is not None:
            (_, original) = stores
            original.write(start, x[1] + linear(others[0][0], original_output).view_as(x[1]))
    return moments


def _in_matrices(weight: Tensor, count: int) -> Tensor:
    """(out, in), or (heads, out, in) of a part -> (count, ..., in): all rows together if their inputs are one."""
    return weight.reshape(count, -1, weight.shape[-1])


def _add_output(weight: Tensor, store: RowStore, context: RowStore, slices: Sequence[tuple[int, int]]) -> None:
    for start, stop in sliced_batches(store, weight.device, slices):
        rows, inputs = (part.read(start, stop).to(weight.device) for part in (store, context))
        store.write(start, rows + linear(inputs, weight))
