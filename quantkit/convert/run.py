"""`convert`: source shards -> layer -> expert -> quantised tensor -> sinks, one loop for every method, format and
device.

`prepare` has planned, and refused what can be refused. Here come the tensors outside the layers, then layer by layer,
each synced and then recorded in the journal, then the files around the weights, the validation, and one rename.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from quantkit.arch.base import Block, ModelArch
from quantkit.calibrate.chunk_sizes import own_rows
from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.stream import MtpEntrance, forward_layer
from quantkit.convert.background import foreground
from quantkit.convert.conversion import Conversion
from quantkit.convert.copying import copy_kept, quantize_tables
from quantkit.convert.events import LayerDone, OnEvent, Report, StageStarted, Started
from quantkit.convert.fingerprint import journal_header
from quantkit.convert.finish import finish
from quantkit.convert.finished import report_finished
from quantkit.convert.hidden import StreamFiles, Streams
from quantkit.convert.layer import LayerResult, quantize_layer, quantize_without_inputs
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.layer_writer import LayerWriter
from quantkit.convert.opening import open_conversion, open_fisher, open_folder, open_imatrix
from quantkit.convert.output_hessians import LayerGradients
from quantkit.convert.outputs import OutputChoice
from quantkit.convert.prepare import Job
from quantkit.convert.pruning import without_experts
from quantkit.convert.scheduled import schedule_of
from quantkit.convert.together import refuse_different, refuse_unshared
from quantkit.convert.tune import quantize_and_tune
from quantkit.convert.weights import LayerWeights
from quantkit.documents.journal import LayerEntry, OutsideEntry, TensorRecord
from quantkit.evaluate.validation import model_of
from quantkit.formats.checksums import WrittenRange, merged
from quantkit.plan.decide import Action
from quantkit.plan.machine import Machine
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.schedule import KEPT, MTP_INPUTS, OUTSIDE, PASSING, Schedule
from quantkit.quantizers import Method
from quantkit.ranks.ranks import ALONE, Ranks
from quantkit.schemes import ChosenScheme, QuantError
from quantkit.sensitivity.moments import head_blocks

MakeEntry = Callable[[tuple[TensorRecord, ...], tuple[tuple[WrittenRange, ...], ...]], OutsideEntry | LayerEntry]
"""Records of tensors, and by output what was written -> a line of the journal."""


def convert(job: Job, machine: Machine, on_event: OnEvent) -> Report:
    """Do a prepared job, or go on with it where an earlier process was killed: the files are the same bytes as those
    of an unbroken one. On a GPU ``on_event`` hears of finished tensors from the thread that writes them.

    Raises a `QuantkitError` with one line for whatever a file or the machine can cause.
    """
    report = convert_on_ranks(job, machine, on_event, ALONE)
    assert report is not None, "a process alone is the first"
    return report


def convert_on_ranks(job: Job, machine: Machine, on_event: OnEvent, ranks: Ranks) -> Report | None:
    """`convert`, shared by ranks that all prepared the same job: the same bytes. The first one finishes the result and
    has the report, the others leave before.

    Raises `PlanError` too if the ranks are of different minds, or what the recipe asks for does not run on several;
    `RankLostError` if another rank failed.
    """
    if ranks.count > 1:
        ranks.agreed(lambda: refuse_unshared(job, ranks))
    with ExitStack() as stack:
        stack.enter_context(foreground(machine.device))
        importance, sensitivity = ranks.agreed(lambda: (open_imatrix(stack, job), open_fisher(job)))
        # Of all ranks of the host: what the report says does not depend on their number.
        host = replace(machine, budget=machine.budget * ranks.on_host)
        first = journal_header(job.plan.recipe, job.source, job.rows, importance, sensitivity, job.scores, host)
        refuse_different(ranks, first.job.bytes_follow_from())
        folder, journal = open_folder(stack, job, first, ranks)
        if ranks.of_first(lambda: folder.finished):
            return report_finished(job, folder, first.job, on_event) if ranks.first else None
        job, whole = without_experts(job, folder, machine, on_event)
        conversion = open_conversion(
            stack, job, machine, folder, journal, importance, sensitivity, on_event, whole, ranks
        )
        resumed = ranks.first and bool(conversion.journal.entries)
        with conversion.timer.stage("compilation"):
            schedule = schedule_of(conversion, job.needs)
        quantize_layers(conversion, job.rows, schedule)
        return finish(conversion, first.job, job.rows, job.base_dir, resumed=resumed) if ranks.first else None


def quantize_layers(conversion: Conversion, rows: TokenRows | None, schedule: Schedule) -> None:
    """All that is to be quantised or copied: outside the layers, then layer after layer. A layer of which no output
    stores anything is passed as it is, where hidden states are to go on."""
    layers, ranks = stored_layers(conversion.plan), conversion.ranks
    begun = ranks.of_first(lambda: _begun(conversion, calibrated=rows is not None))
    done = begun.layers
    n_tokens = 0 if rows is None else rows.tokens.size
    doubtful = () if rows is None else rows.warnings
    warnings = (*conversion.plan.warnings, *doubtful)
    conversion.on_event(Started(len(layers), conversion.plan.source_bytes, n_tokens, len(done), warnings, schedule))
    if not begun.outside:
        with conversion.timer.stage("copy"):
            conversion.on_event(StageStarted(OUTSIDE))
            copy_kept(conversion, None)
            tables = _table_records(quantize_tables(conversion, None))
            _append(conversion, tables, lambda records, written: OutsideEntry(tensors=records, written=written))
    files = StreamFiles(
        conversion.folder.hidden,
        conversion.stores,
        None if rows is None else own_rows(len(rows.tokens), ranks.number, ranks.count),
        two=conversion.plan.follows_original,
        scratch_dtype=_scratch_dtype(conversion),
    )
    streams, border = None, _calibrated_layers(conversion.plan, conversion.arch)
    with conversion.timer.stage("embeddings"):
        if rows is not None and any(layer < border for layer in layers if layer not in done):
            streams = files.open(rows, conversion.arch, conversion.source, after=begun.saved)
    for layer in range(max(layers, default=-1) + 1):
        if layer in done:
            continue
        if streams is not None and layer >= border:
            streams.close()
            streams = None
        if streams is not None and rows is not None and layer >= conversion.arch.n_layers:
            streams = _enter_mtp(conversion, layer, streams, files, torch.from_numpy(rows.tokens).long())
        if layer in layers:
            _layer(conversion, layer, streams, files)
        elif streams is not None:
            _pass(conversion, layer, streams)
    if streams is not None:
        streams.close()


def _calibrated_layers(plan: Plan, arch: ModelArch) -> int:
    """Layers that the calibration text goes through: the model's, and MTP layers that learn from it."""
    return arch.n_layers + (len(arch.mtp_layers()) if plan.calibrates_mtp else 0)


def _enter_mtp(conversion: Conversion, layer: int, streams: Streams, files: StreamFiles, tokens: Tensor) -> Streams:
    """Carry the streams from the layer before into an MTP layer. Position i takes the embedding of a later token, so
    the last position of each row has none and is left out."""
    conversion.on_event(StageStarted(MTP_INPUTS, layer))
    arch, source, device = conversion.arch, conversion.source, conversion.machine.device
    with conversion.timer.stage("layers"):
        model = model_of(arch, source, device, conversion.share.cache // 2)
        embed = arch.mtp_layers()[layer].embed
        entrance = MtpEntrance.of(arch, layer, model.weights, lambda ids: source.read_rows(embed, ids.tolist()).float())
        following = tokens[:, layer - arch.n_layers + 1 :]
        entered = files.shortened(streams, lambda old, new: entrance.enter(old, following, new, device))
        model.forget()
    return entered


def _pass(conversion: Conversion, layer: int, streams: Streams) -> None:
    """Carry the streams through a layer that stays as it is."""
    conversion.on_event(StageStarted(PASSING, layer))
    device = conversion.machine.device
    with conversion.timer.stage("layers passed"):
        model = model_of(conversion.arch, conversion.source, device, conversion.share.cache // 2)
        for store in streams.stores():
            scratch = streams.new_rows(conversion.arch.hidden_size)
            forward_layer(conversion.arch.sublayers(layer), model.weights, store, scratch, device)
            scratch.close()
        model.forget()


def _scratch_dtype(conversion: Conversion) -> torch.dtype:
    """The dtype in which a block's inputs are kept for all tokens: float32 unless all linears of the source are
    BF16."""
    infos = conversion.source.infos()
    stored = {infos[spec.name].dtype for spec in conversion.arch.tensors() if spec.linear and spec.name in infos}
    return conversion.machine.scratch_dtype if stored == {"BF16"} else torch.float32


@dataclass(frozen=True, slots=True)
class _Begun:
    """What an earlier process has finished: tensors outside the layers, layers, and the last layer after which hidden
    states are saved."""

    outside: bool
    layers: set[int]
    saved: int | None


def _begun(conversion: Conversion, *, calibrated: bool) -> _Begun:
    """What the first rank's journal says."""
    _rewind(conversion, calibrated=calibrated)
    journal = conversion.journal
    saved = (entry.layer for entry in journal.layers if entry.saved)
    return _Begun(journal.outside_done, {entry.layer for entry in journal.layers}, max(saved, default=None))


def _rewind(conversion: Conversion, *, calibrated: bool) -> None:
    """Take back the layers after the last saved border, unless all that need hidden states are done."""
    entries = conversion.journal.entries
    layers = [entry.layer for entry in conversion.journal.layers]
    if not calibrated or _calibrated_layers(conversion.plan, conversion.arch) - 1 in layers:
        return
    kept = [number for number, entry in enumerate(entries, 1) if isinstance(entry, OutsideEntry) or entry.saved]
    conversion.journal.rewind(max(kept, default=0))


def _layer(conversion: Conversion, layer: int, streams: Streams | None, files: StreamFiles) -> None:
    """Quantise one layer, bring it to the disk, and say so in the journal."""
    start = time.monotonic()
    sublayers = conversion.arch.sublayers(layer)
    blocks = tuple(block for sublayer in sublayers for block in sublayer)
    job, writer = _layer_job(conversion, layer, streams, blocks), LayerWriter(conversion, layer)
    result = LayerResult()
    for following in range(layer, layer + 3):
        _prefetch(conversion, following)
    with conversion.timer.stage("layers" if streams is not None else "layers without calibration"):
        if streams is None:
            quantize_without_inputs(job, blocks, writer, conversion.importance)
        else:
            tuned = conversion.plan.recipe.tune is not None
            result = (
                quantize_and_tune(conversion, layer, job, sublayers, writer)
                if tuned
                else quantize_layer(job, sublayers, writer)
            )
        if conversion.deliveries is not None:
            conversion.deliveries.drain()
    with conversion.timer.stage("copy"):
        conversion.on_event(StageStarted(KEPT, layer))
        copy_kept(conversion, layer, result.foldings, result.changed)
        records = _table_records([*writer.tensors, *quantize_tables(conversion, layer)])
    with conversion.timer.stage("sync"):
        # Nothing needs the hidden states after the last calibrated layer. Those of MTP layers are short: they are not
        # saved, a resumed run goes on from before.
        last = min(conversion.arch.n_layers, _calibrated_layers(conversion.plan, conversion.arch) - 1)
        saved = streams is not None and layer < last and conversion.ranks.of_first(files.due)
        if streams is not None and saved:
            files.save(streams, layer)
        _append(
            conversion,
            records,
            lambda tensors, written: LayerEntry(
                layer=layer,
                saved=saved,
                tensors=tensors,
                experts=result.experts,
                written=written,
                tuning=result.tuning,
            ),
        )
        if saved and conversion.ranks.first:
            files.forget_before(layer)
    n_tokens = 0 if streams is None else streams.x.n_rows * streams.x.length
    conversion.on_event(LayerDone(layer, time.monotonic() - start, n_tokens))


def _layer_job(conversion: Conversion, layer: int, streams: Streams | None, blocks: tuple[Block, ...]) -> LayerJob:
    """What quantising a layer needs of the conversion."""
    calibration = conversion.plan.recipe.calibration
    names = tuple(name for block in blocks for name in block.linears) if streams is not None else ()
    pairs = zip(conversion.plan.outputs, conversion.sinks, strict=True)
    weights = LayerWeights(
        conversion.weights,
        conversion.arch.parts(),
        carries_quantised=conversion.plan.recipe.propagate == "quantized",
        cache_bytes=conversion.share.cache,
        device=conversion.machine.device,
        narrow=conversion.machine.scratch_dtype,
    )
    return LayerJob(
        outputs=tuple(
            OutputChoice(
                _methods(output, layer), frozenset(filter(sink.wants_importance, names)), _verbatim(output, layer)
            )
            for output, sink in pairs
        ),
        weights=weights,
        streams=streams,
        experts_at_once=conversion.share.experts_at_once,
        min_expert_tokens=0 if calibration is None else calibration.min_expert_tokens,
        gradients=None if streams is None else _gradients(conversion, layer, weights),
        fits_routers=conversion.plan.recipe.router == "least_squares",
        ranks=conversion.ranks,
    )


def _gradients(conversion: Conversion, layer: int, weights: LayerWeights) -> LayerGradients | None:
    """What the Fisher pass left of a layer; nothing of MTP layers, which it does not reach."""
    sensitivity, arch = conversion.sensitivity, conversion.arch
    methods = (method for output in conversion.plan.outputs for _, method in _methods(output, layer).values())
    if sensitivity is None or layer >= arch.n_layers or not any(method.output_aware for method in methods):
        return None
    device = conversion.machine.device
    opened = partial(
        sensitivity.sublayer, layer, weights=weights.original, new_store=conversion.stores.new, device=device
    )
    return LayerGradients(opened, head_blocks(arch), arch.parts())


def _record(output: int, name: str, error: QuantError) -> TensorRecord:
    """What the journal says of a quantised matrix."""
    return TensorRecord(output, name, error.relative_loss, error.n_tokens, error.fallback, error.output_loss)


def _table_records(tables: list[tuple[int, str, QuantError]]) -> list[TensorRecord]:
    return [_record(*table) for table in tables]


def stored_layers(plan: Plan) -> list[int]:
    """Every layer that some output writes, MTP layers included, in order."""
    decisions = [d for output in plan.outputs for d in output.decisions.values() if d.action is not Action.DROP]
    return sorted({d.spec.layer for d in decisions if d.spec.layer is not None})


def _methods(output: OutputPlan, layer: int) -> dict[str, tuple[ChosenScheme, Method]]:
    """Scheme and method of every linear of a layer that an output quantises."""
    return {
        name: decision.quantising
        for name, decision in output.decisions.items()
        if decision.spec.layer == layer and decision.quantising is not None
    }


def _verbatim(output: OutputPlan, layer: int) -> frozenset[str]:
    """Tensors of a layer whose FP8 bytes an output takes over."""
    decisions = (decision for decision in output.decisions.values() if decision.spec.layer == layer)
    return frozenset(d.spec.official for d in decisions if d.action is Action.KEEP and d.scheme is not None)


def _prefetch(conversion: Conversion, layer: int) -> None:
    """Let the kernel, or a remote source's cache, read a layer's bytes before they are asked for, of what some output
    stores."""
    decisions = (decision for output in conversion.plan.outputs for decision in output.decisions.values())
    names = dict.fromkeys(
        decision.spec.official
        for decision in decisions
        if decision.spec.layer == layer and decision.action is not Action.DROP
    )
    conversion.source.prefetch(list(names)[conversion.ranks.number :: conversion.ranks.count])


def _append(conversion: Conversion, records: list[TensorRecord], entry: MakeEntry) -> None:
    """Bring what all ranks wrote to the disk, then say so in the journal. ``records``: of this rank's tensors."""
    for sink in conversion.sinks:
        sink.sync()
    steps = conversion.ranks.gathered((records, [sink.written() for sink in conversion.sinks]))
    if conversion.own_journal is not None:
        tensors = tuple(record for records, _ in steps for record in records)
        by_output = zip(*(written for _, written in steps), strict=True)
        conversion.own_journal.append(entry(tensors, tuple(merged(chain.from_iterable(parts)) for parts in by_output)))
