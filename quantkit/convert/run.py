"""`convert`: source shards -> layer -> expert -> quantised tensor -> sinks, one loop for every method, format and
device.

`prepare` has planned, and refused what can be refused. Here come the tensors outside the layers, then layer by layer,
each synced and then recorded in the journal, then the files around the weights, the validation, and one rename.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.arch.base import Block, ModelArch
from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.calibrate.stream import MtpEntrance, forward_layer
from quantkit.convert.background import AheadSource, Deliveries, DirectSource, foreground
from quantkit.convert.conversion import Conversion
from quantkit.convert.copying import copy_kept, quantize_tables
from quantkit.convert.events import LayerDone, OnEvent, Report, StageStarted, Started
from quantkit.convert.fingerprint import journal_header
from quantkit.convert.finish import finish, result_folder
from quantkit.convert.finished import report_finished
from quantkit.convert.folder import OutputFolder, is_begun
from quantkit.convert.hidden import StreamFiles, Streams
from quantkit.convert.journal import Journal
from quantkit.convert.layer import LayerResult, quantize_layer, quantize_without_inputs
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.layer_writer import LayerWriter
from quantkit.convert.output_hessians import LayerGradients
from quantkit.convert.outputs import OutputChoice
from quantkit.convert.prepare import Job
from quantkit.convert.pruning import Whole, without_experts
from quantkit.convert.repack import refuse_misfits
from quantkit.convert.scheduled import schedule_of
from quantkit.convert.tune import quantize_and_tune
from quantkit.convert.weights import LayerWeights, WeightSource
from quantkit.documents.journal import LayerEntry, OutsideEntry, TensorRecord
from quantkit.errors import OutputError
from quantkit.evaluate.validation import model_of
from quantkit.formats.checksums import WrittenRange
from quantkit.formats.model_source import ModelSource
from quantkit.plan.batch_sizes import share_of
from quantkit.plan.decide import Action
from quantkit.plan.machine import Machine, Stores, Timer
from quantkit.plan.memory import check_free_disk
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.schedule import KEPT, MTP_INPUTS, OUTSIDE, PASSING, Schedule
from quantkit.plan.targets import Sink
from quantkit.quantizers import Method
from quantkit.schemes import ChosenScheme, QuantError
from quantkit.sensitivity.moments import head_blocks
from quantkit.sensitivity.open import Sensitivity, open_sensitivity


def convert(job: Job, machine: Machine, on_event: OnEvent) -> Report:
    """Do a prepared job, or go on with it where an earlier process was killed: the files are the same bytes as those
    of an unbroken one. On a GPU ``on_event`` hears of finished tensors from the thread that writes them.

    Raises a `QuantkitError` with one line for whatever a file or the machine can cause.
    """
    with ExitStack() as stack:
        stack.enter_context(foreground(machine.device))
        importance, sensitivity = open_imatrix(stack, job), open_fisher(job)
        names = [output.output.name for output in job.plan.outputs]
        if not is_begun(job.out) and job.plan.recipe.prune is None:
            refuse_misfits(job.source, job.plan)
        folder = stack.enter_context(OutputFolder(job.out, names, restart=job.restart))
        first = journal_header(job.plan.recipe, job.source, job.rows, importance, sensitivity, machine)
        if folder.finished:
            return report_finished(job, folder, first.job, on_event)
        journal = Journal(folder.journal, first, job.source.files[0].parent)
        stack.callback(journal.close)
        if not journal.entries:
            check_free_disk(job.needs, folder.partial, folder.reserved_bytes)
        job, whole = without_experts(job, folder, machine, on_event)
        conversion = open_conversion(stack, job, machine, folder, journal, importance, sensitivity, on_event, whole)
        resumed = bool(journal.entries)
        with conversion.timer.stage("compilation"):
            schedule = schedule_of(conversion, job.needs)
        quantize_layers(conversion, job.rows, schedule)
        return finish(conversion, first.job, job.rows, job.base_dir, resumed=resumed)


def open_conversion(
    stack: ExitStack,
    job: Job,
    machine: Machine,
    folder: OutputFolder,
    journal: Journal,
    importance: ImportanceFile | None,
    sensitivity: Sensitivity | None,
    on_event: OnEvent,
    whole: Whole | None,
) -> Conversion:
    """Open what a conversion works with, until ``stack`` is closed."""
    plan, share = job.plan, share_of(job.needs, machine.hardware)
    sinks = tuple(_open_sink(folder, output, plan, job.source.directory, journal) for output in plan.outputs)
    for sink in sinks:
        stack.callback(sink.close)
    weights, deliveries = _threads_beside(stack, job.source, machine)
    return Conversion(
        plan=plan,
        arch=job.arch,
        source=job.source,
        machine=machine,
        folder=folder,
        journal=journal,
        stores=Stores(folder.hidden, share.stores, machine.device, share.device_stores),
        share=share,
        sinks=sinks,
        importance=importance,
        sensitivity=sensitivity,
        on_event=on_event,
        timer=Timer(),
        weights=weights,
        deliveries=deliveries,
        whole=whole,
    )


def open_imatrix(stack: ExitStack, job: Job) -> ImportanceFile | None:
    """The imatrix file that the recipe names, if it does, until ``stack`` is closed."""
    if job.plan.recipe.imatrix is None:
        return None
    importance = ImportanceFile.open(job.base_dir / job.plan.recipe.imatrix, job.arch)
    stack.callback(importance.close)
    return importance


def open_fisher(job: Job) -> Sensitivity | None:
    """The Fisher pass that the recipe names, if some method is output-aware or layers are tuned. Raises `OutputError`
    or `SourceError` if it is not finished, or of another checkpoint."""
    named, recipe = job.plan.recipe.sensitivity, job.plan.recipe
    if named is None or not (recipe.output_aware or recipe.tune):
        return None
    return open_sensitivity(job.base_dir / named, job.source, job.arch)


def _threads_beside(stack: ExitStack, source: ModelSource, machine: Machine) -> tuple[WeightSource, Deliveries | None]:
    """What reads weights and what writes: beside the computation, where that leaves the processors free."""
    if not _works_beside(machine):
        return DirectSource(source), None
    ahead, deliveries = AheadSource(source, machine.device), Deliveries(machine.device)
    stack.callback(ahead.close)
    stack.callback(deliveries.close)
    return ahead, deliveries


def _works_beside(machine: Machine) -> bool:
    """Whether threads read and write beside the computation."""
    return machine.device.type == "cuda"


def quantize_layers(conversion: Conversion, rows: TokenRows | None, schedule: Schedule) -> None:
    """All that is to be quantised or copied: outside the layers, then layer after layer. A layer of which no output
    stores anything is passed as it is, where hidden states are to go on."""
    layers = stored_layers(conversion.plan)
    _rewind(conversion, calibrated=rows is not None)
    done = {entry.layer for entry in conversion.journal.layers}
    n_tokens = 0 if rows is None else rows.tokens.size
    doubtful = () if rows is None else rows.warnings
    warnings = (*conversion.plan.warnings, *doubtful)
    conversion.on_event(Started(len(layers), conversion.plan.source_bytes, n_tokens, len(done), warnings, schedule))
    if not conversion.journal.outside_done:
        with conversion.timer.stage("copy"):
            conversion.on_event(StageStarted(OUTSIDE))
            copy_kept(conversion, None)
            tables = _table_records(quantize_tables(conversion, None))
            _sync(conversion)
            conversion.journal.append(OutsideEntry(tensors=tuple(tables), written=_written(conversion)))
    files = StreamFiles(
        conversion.folder.hidden,
        conversion.stores,
        two=conversion.plan.follows_original,
        scratch_dtype=_scratch_dtype(conversion),
    )
    streams, border = None, _calibrated_layers(conversion.plan, conversion.arch)
    with conversion.timer.stage("embeddings"):
        if rows is not None and any(layer < border for layer in layers if layer not in done):
            saved = [entry.layer for entry in conversion.journal.layers if entry.saved]
            streams = files.open(rows, conversion.arch, conversion.source, after=max(saved, default=None))
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
    _prefetch(conversion, layer + 1)
    _prefetch(conversion, layer + 2)
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
        _sync(conversion)
        # Nothing needs the hidden states after the last calibrated layer. Those of MTP layers are short: they are not
        # saved, a resumed run goes on from before.
        last = min(conversion.arch.n_layers, _calibrated_layers(conversion.plan, conversion.arch) - 1)
        saved = streams is not None and layer < last and files.due()
        if streams is not None and saved:
            files.save(streams, layer)

        conversion.journal.append(
            LayerEntry(
                layer=layer,
                saved=saved,
                tensors=tuple(records),
                experts=result.experts,
                written=_written(conversion),
                tuning=result.tuning,
            )
        )
        if saved:
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
    """Let the kernel read the next layer's bytes while this one is computed, of what some output stores."""
    decisions = (decision for output in conversion.plan.outputs for decision in output.decisions.values())
    names = dict.fromkeys(
        decision.spec.official
        for decision in decisions
        if decision.spec.layer == layer and decision.action is not Action.DROP
    )
    conversion.source.prefetch(list(names))


def _sync(conversion: Conversion) -> None:
    for sink in conversion.sinks:
        sink.sync()


def _written(conversion: Conversion) -> tuple[tuple[WrittenRange, ...], ...]:
    return tuple(sink.written() for sink in conversion.sinks)


def _open_sink(folder: OutputFolder, output: OutputPlan, plan: Plan, source: Path, journal: Journal) -> Sink:
    sink = output.target.open_sink(result_folder(folder, plan, output), source, output.planned)
    if journal.entries and sink.fresh:
        raise OutputError(
            f"{folder.partial}: the files of the unfinished job are gone.", hint="Begin anew with --restart."
        )
    return sink
