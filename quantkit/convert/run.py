"""`convert`: source shards -> layer -> expert -> quantised tensor -> sinks, one loop for every method, format and
device.

`prepare` has planned, and refused what can be refused. Here come the tensors outside the layers, then layer by layer,
each synced and then recorded in the journal, then the files around the weights, the validation, and one rename.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from quantkit.arch.base import Block, ModelArch
from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.convert.background import AheadSource, Deliveries, DirectSource, foreground
from quantkit.convert.conversion import Conversion
from quantkit.convert.copying import copy_kept, quantize_tables
from quantkit.convert.events import LayerDone, OnEvent, Report, StageStarted, Started
from quantkit.convert.fingerprint import job_header
from quantkit.convert.finish import finish, result_folder
from quantkit.convert.folder import OutputFolder
from quantkit.convert.hidden import StreamFiles, Streams
from quantkit.convert.journal import Journal
from quantkit.convert.layer import LayerResult, linears_in, quantize_layer, quantize_without_inputs
from quantkit.convert.layer_job import ExpertCounts, LayerJob
from quantkit.convert.layer_writer import LayerWriter
from quantkit.convert.outputs import OutputChoice
from quantkit.convert.prepare import Job
from quantkit.convert.weights import LayerWeights, WeightSource
from quantkit.documents.journal import ExpertRecord, JobHeader, LayerEntry, OutsideEntry, TensorRecord
from quantkit.errors import OutputError
from quantkit.formats.fp8_source import Fp8Source
from quantkit.plan.batch_sizes import share_of
from quantkit.plan.decide import Action
from quantkit.plan.machine import Machine, Stores, Timer
from quantkit.plan.memory import check_free_disk
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.targets import Sink
from quantkit.quantizers import Method
from quantkit.schemes import ChosenScheme, Float8Scheme, QuantError


def convert(job: Job, machine: Machine, on_event: OnEvent) -> Report:
    """Do a prepared job, or go on with it where an earlier process was killed: the files are the same bytes as those
    of an unbroken one. On a GPU ``on_event`` hears of finished tensors from the thread that writes them.

    Raises a `QuantkitError` with one line for whatever a file or the machine can cause.
    """
    opened, arch, plan, needs = job.source, job.arch, job.plan, job.needs
    recipe, rows, base_dir = plan.recipe, job.rows, job.base_dir
    with ExitStack() as stack:
        stack.enter_context(foreground(machine.device))
        share = share_of(needs, machine.hardware)
        importance = _open_imatrix(stack, recipe, arch, base_dir)
        folder = stack.enter_context(OutputFolder(job.out, restart=job.restart))
        header = job_header(recipe, opened, rows, importance, machine)
        journal = Journal(folder.journal, header)
        stack.callback(journal.close)
        if not journal.entries:
            check_free_disk(plan, needs, folder.partial, folder.reserved_bytes)
        sinks = tuple(_open_sink(folder, output, plan, opened.directory, journal) for output in plan.outputs)
        for sink in sinks:
            stack.callback(sink.close)
        stores = Stores(folder.hidden, share.stores, machine.device, share.device_stores)
        weights, deliveries = _threads_beside(stack, opened, machine)
        walk = Conversion(
            plan,
            arch,
            opened,
            machine,
            folder,
            journal,
            stores,
            share,
            sinks,
            importance,
            on_event,
            Timer(),
            weights,
            deliveries,
        )
        return _run(walk, rows, header, base_dir)


def _open_imatrix(stack: ExitStack, recipe: Recipe, arch: ModelArch, base_dir: Path) -> ImportanceFile | None:
    if recipe.imatrix is None:
        return None
    importance = ImportanceFile.open(base_dir / recipe.imatrix, arch)
    stack.callback(importance.close)
    return importance


def _threads_beside(stack: ExitStack, source: Fp8Source, machine: Machine) -> tuple[WeightSource, Deliveries | None]:
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


def _run(walk: Conversion, rows: TokenRows | None, header: JobHeader, base_dir: Path) -> Report:
    resumed = bool(walk.journal.entries)
    layers = _layers(walk.plan)
    _rewind(walk, calibrated=rows is not None)
    done = {entry.layer for entry in walk.journal.layers}
    n_tokens = 0 if rows is None else rows.tokens.size
    walk.on_event(Started(len(layers), walk.plan.source_bytes, n_tokens, len(done)))
    if not walk.journal.outside_done:
        with walk.timer.stage("copy"):
            walk.on_event(StageStarted("embeddings"))
            copy_kept(walk, None)
            tables = _table_records(quantize_tables(walk, None))
            _sync(walk)
            walk.journal.append(OutsideEntry(tensors=tuple(tables)))
    files = StreamFiles(
        walk.folder.hidden,
        walk.stores,
        two=walk.plan.follows_original,
        scratch_dtype=_scratch_dtype(walk),
    )
    with walk.timer.stage("embeddings"):
        streams = None
        if rows is not None and any(layer < walk.arch.n_layers for layer in layers if layer not in done):
            saved = [entry.layer for entry in walk.journal.layers if entry.saved]
            streams = files.open(rows, walk.arch, walk.source, after=max(saved, default=None))
    for layer in layers:
        if layer not in done:
            _layer(walk, layer, streams if layer < walk.arch.n_layers else None, files, n_tokens)
    if streams is not None:
        streams.close()
    return finish(walk, header, rows, base_dir, resumed=resumed)


def _scratch_dtype(walk: Conversion) -> torch.dtype:
    """Of what a block reads, kept for all tokens: float32 if some linears of the source compute in it anywhere."""
    infos = walk.source.infos()
    stored = {infos[spec.name].dtype for spec in walk.arch.tensors() if spec.linear and spec.name in infos}
    return walk.machine.scratch_dtype if stored == {"BF16"} else torch.float32


def _rewind(walk: Conversion, *, calibrated: bool) -> None:
    """Take back the layers after the last saved border, unless all that need hidden states are done."""
    entries = walk.journal.entries
    layers = [entry.layer for entry in walk.journal.layers]
    if not calibrated or walk.arch.n_layers - 1 in layers:
        return
    kept = [number for number, entry in enumerate(entries, 1) if isinstance(entry, OutsideEntry) or entry.saved]
    walk.journal.rewind(max(kept, default=0))


def _layer(walk: Conversion, layer: int, streams: Streams | None, files: StreamFiles, n_tokens: int) -> None:
    """Quantise one layer, bring it to the disk, and say so in the journal."""
    start = time.monotonic()
    sublayers = walk.arch.sublayers(layer)
    blocks = tuple(block for sublayer in sublayers for block in sublayer)
    job, writer = _layer_job(walk, layer, streams, blocks), LayerWriter(walk, layer)
    result = LayerResult({}, ())
    _prefetch(walk, layer + 1)
    _prefetch(walk, layer + 2)
    with walk.timer.stage("layers" if streams is not None else "layers without calibration"):
        if streams is None:
            quantize_without_inputs(job, blocks, writer, walk.importance)
        else:
            result = quantize_layer(job, sublayers, writer)
        if walk.deliveries is not None:
            walk.deliveries.drain()
    with walk.timer.stage("copy"):
        copy_kept(walk, layer, result.foldings)
        records = _table_records([*writer.tensors, *quantize_tables(walk, layer)])
    with walk.timer.stage("sync"):
        _sync(walk)
        # Nothing needs the hidden states after the last decoder layer.
        saved = streams is not None and layer < walk.arch.n_layers - 1 and files.due()
        if streams is not None and saved:
            files.save(streams, layer)
        experts = _expert_records(result.counts)
        walk.journal.append(LayerEntry(layer=layer, saved=saved, tensors=tuple(records), experts=experts))
        if saved:
            files.forget_before(layer)
    walk.on_event(LayerDone(layer, time.monotonic() - start, n_tokens if streams is not None else 0))


def _layer_job(walk: Conversion, layer: int, streams: Streams | None, blocks: tuple[Block, ...]) -> LayerJob:
    """What quantising a layer needs of the conversion."""
    calibration = walk.plan.recipe.calibration
    names = tuple(linears_in(blocks)) if streams is not None else ()
    pairs = zip(walk.plan.outputs, walk.sinks, strict=True)
    return LayerJob(
        outputs=tuple(
            OutputChoice(
                _methods(output, layer), frozenset(filter(sink.wants_importance, names)), _verbatim(output, layer)
            )
            for output, sink in pairs
        ),
        weights=LayerWeights(
            walk.weights,
            walk.arch.parts(),
            carries_quantised=walk.plan.recipe.propagate == "quantized",
            cache_bytes=walk.share.cache,
            device=walk.machine.device,
            narrow=walk.machine.scratch_dtype,
        ),
        streams=streams,
        experts_at_once=walk.share.experts_at_once,
        min_expert_tokens=0 if calibration is None else calibration.min_expert_tokens,
    )


def _record(output: int, name: str, error: QuantError) -> TensorRecord:
    """What the journal says of a quantised matrix."""
    return TensorRecord(output, name, error.relative_loss, error.n_tokens, error.fallback)


def _table_records(tables: list[tuple[int, str, QuantError]]) -> list[TensorRecord]:
    return [_record(*table) for table in tables]


def _expert_records(counts_by_block: Mapping[str, list[ExpertCounts]]) -> dict[str, tuple[ExpertRecord, ...]]:
    """What the journal says of each routed expert, by block."""
    return {
        name: tuple(ExpertRecord(count.n_tokens, count.gate_weight, count.borrowed) for count in counts)
        for name, counts in counts_by_block.items()
    }


def _layers(plan: Plan) -> list[int]:
    """Every layer that some output writes, MTP layers included, in order."""
    decisions = [d for output in plan.outputs for d in output.decisions.values() if d.action is not Action.DROP]
    return sorted({d.spec.layer for d in decisions if d.spec.layer is not None})


def _methods(output: OutputPlan, layer: int) -> dict[str, tuple[ChosenScheme, Method]]:
    """Scheme and method of every linear of a layer that an output quantises."""
    return {
        name: (decision.scheme, decision.method)
        for name, decision in output.decisions.items()
        if decision.spec.layer == layer
        and decision.scheme is not None
        and not isinstance(decision.scheme, Float8Scheme)
        and decision.method is not None
    }


def _verbatim(output: OutputPlan, layer: int) -> frozenset[str]:
    """Tensors of a layer whose FP8 bytes an output takes over."""
    decisions = (decision for decision in output.decisions.values() if decision.spec.layer == layer)
    return frozenset(d.spec.official for d in decisions if d.action is Action.KEEP and d.scheme is not None)


def _prefetch(walk: Conversion, layer: int) -> None:
    """Let the kernel read the next layer's bytes while this one is computed, of what some output stores."""
    decisions = (decision for output in walk.plan.outputs for decision in output.decisions.values())
    names = dict.fromkeys(
        decision.spec.official
        for decision in decisions
        if decision.spec.layer == layer and decision.action is not Action.DROP
    )
    walk.source.prefetch(list(names))


def _sync(walk: Conversion) -> None:
    for sink in walk.sinks:
        sink.sync()


def _open_sink(folder: OutputFolder, output: OutputPlan, plan: Plan, source: Path, journal: Journal) -> Sink:
    sink = output.target.open_sink(result_folder(folder, plan, output), source, output.planned)
    if journal.entries and sink.fresh:
        raise OutputError(
            f"{folder.partial}: the files of the unfinished job are gone.", hint="Begin anew with --restart."
        )
    return sink
