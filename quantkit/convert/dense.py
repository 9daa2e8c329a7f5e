"""Dense blocks of a layer: stage by stage over batches of rows, each stage's statistics taken with the earlier stages'
quantised weights."""

from __future__ import annotations

from torch import Tensor

from quantkit.arch.base import DenseBlock, InputGroup, Stage
from quantkit.arch.ops import linear
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputMoments, Inputs
from quantkit.calibrate.stream import row_batches
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import Linears, any_quantised, any_wanted, needs_inputs, quantize_linears


def quantize_dense(job: LayerJob, block: DenseBlock) -> None:
    """Quantise the block's linears stage by stage, and carry the streams through it."""
    context = job.new_rows(job.weights.shape(block.output)[1])
    for stage in block.stages:
        last = stage is block.stages[-1]
        if not (last or any(any_wanted(job.outputs, group.linears) for group in stage.groups)):
            continue
        moments = _moments_of_stage(job, stage, block.output, context if last else None)
        for group, sums in zip(stage.groups, moments, strict=True):
            quantize_group(job, group, sums.stats())
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


def quantize_group(job: LayerJob, group: InputGroup, stats: Inputs | None) -> None:
    """Quantise linears that read the same, and let the quantised stream compute with them."""
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
