"""`convert`: source shards -> layer -> expert -> quantised tensor -> sinks, one loop for every method, format and
device.

Plan first (everything refusable is refused in seconds), then the tensors outside the layers, then layer by layer, each
synced and then recorded in the journal, then the files around the weights, the validation, and one rename.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import TokenRows, token_rows
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.convert.background import AheadSource, Deliveries, foreground
from quantkit.convert.copying import copy_kept, quantize_tables
from quantkit.convert.events import LayerDone, OnEvent, Report, StageStarted, Started, TensorDone, ignore
from quantkit.convert.fingerprint import job_header
from quantkit.convert.finish import finish, result_folder
from quantkit.convert.folder import OutputFolder, refuse_to_lose
from quantkit.convert.hidden import StreamFiles, Streams
from quantkit.convert.journal import Journal
from quantkit.convert.layer import quantize_layer, quantize_without_inputs
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import Deliver, OutputJob
from quantkit.convert.walk import Walk
from quantkit.convert.weights import LayerWeights
from quantkit.errors import OutputError
from quantkit.formats import open_source
from quantkit.formats.fp8_source import Fp8Source
from quantkit.plan.batch_sizes import share_of
from quantkit.plan.decide import Action
from quantkit.plan.machine import Machine, Stores, Timer
from quantkit.plan.memory import check_budget, check_free_disk, conversion_needs
from quantkit.plan.plan import OutputPlan, Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.targets import Sink
from quantkit.quantizers import Method
from quantkit.quantizers.batch import QuantizedBatch
from quantkit.schemes import ChosenScheme, Float8Scheme, QuantError, QuantizedTensor
from quantkit.tensors import Role


def convert(
    source: Path | str,
    recipe: Recipe,
    out: Path | str,
    *,
    base_dir: Path = Path(),
    device: str = "auto",
    memory_budget: int | None = None,
    jobs: int | None = None,
    restart: bool = False,
    on_event: OnEvent = ignore,
) -> Report:
    """Quantise the checkpoint in folder ``source`` by ``recipe`` and leave the result under ``out``.

    ``base_dir``: where the recipe's relative text files lie; ``memory_budget``: bytes to stay under (default: 60 % of
    the machine); ``jobs``: CPU threads; ``restart``: discard an unfinished job and replace an existing ``out``. An
    unfinished job of the same recipe, source and text is continued, and its files are the same bytes as those of an
    unbroken one. On a GPU ``on_event`` hears of finished tensors from the thread that writes them.

    Raises a `QuantkitError` with one line for whatever a user, a file or the machine can cause.
    """
    if jobs is not None:
        torch.set_num_threads(jobs)
    machine = Machine.of(device, memory_budget)
    with ExitStack() as stack:
        stack.enter_context(foreground(machine.device))
        opened = stack.enter_context(open_source(source))
        arch = arch_of(opened.config)
        plan = make_plan(recipe, arch, opened.infos(), opened.is_float8, opened.block_size)
        for output in plan.outputs:
            output.target.check_source(opened.directory)
        needs = conversion_needs(plan, arch)
        check_budget(needs, machine.budget)
        share = share_of(needs, machine.hardware)
        rows = None if recipe.calibration is None else token_rows(recipe.calibration, opened.directory, base_dir)
        importance = _open_imatrix(stack, recipe, arch, base_dir)
        inputs = [opened.directory, base_dir, *([base_dir / recipe.imatrix] if recipe.imatrix is not None else [])]
        refuse_to_lose(Path(out), *inputs, Path.cwd(), Path("~").expanduser())
        folder = stack.enter_context(OutputFolder(Path(out), restart=restart))
        header = job_header(recipe, opened, rows, importance, machine)
        journal = Journal(folder.journal, header)
        stack.callback(journal.close)
        if not journal.entries:
            check_free_disk(plan, needs, folder.partial, folder.reserved_bytes)
        sinks = tuple(_open_sink(folder, output, plan, opened.directory, journal) for output in plan.outputs)
        for sink in sinks:
            stack.callback(sink.close)
        stores = Stores(folder.hidden, share.stores, machine.device, share.device_stores)
        beside = _threads_beside(stack, opened, machine)
        walk = Walk(
            plan, arch, opened, machine, folder, journal, stores, share, sinks, importance, on_event, Timer(), *beside
        )
        return _run(walk, rows, header, base_dir)


def _open_imatrix(stack: ExitStack, recipe: Recipe, arch: ModelArch, base_dir: Path) -> ImportanceFile | None:
    if recipe.imatrix is None:
        return None
    importance = ImportanceFile.open(base_dir / recipe.imatrix, arch)
    stack.callback(importance.close)
    return importance


def _threads_beside(
    stack: ExitStack, source: Fp8Source, machine: Machine
) -> tuple[AheadSource | None, Deliveries | None]:
    """What reads ahead and what writes, where the computation leaves the processors free."""
    if not _works_beside(machine):
        return None, None
    ahead, deliveries = AheadSource(source, machine.device), Deliveries(machine.device)
    stack.callback(ahead.close)
    stack.callback(deliveries.close)
    return ahead, deliveries


def _works_beside(machine: Machine) -> bool:
    """Whether threads read and write beside the computation."""
    return machine.device.type == "cuda"


def _run(walk: Walk, rows: TokenRows | None, header: dict[str, object], base_dir: Path) -> Report:
    resumed = bool(walk.journal.entries)
    layers = _layers(walk.plan)
    _rewind(walk, calibrated=rows is not None)
    done = {entry["layer"] for entry in walk.journal.of_kind("layer")}
    n_tokens = 0 if rows is None else rows.tokens.size
    walk.on_event(Started(len(layers), walk.plan.source_bytes, n_tokens, len(done)))
    if not walk.journal.of_kind("outside"):
        with walk.timer.stage("copy"):
            walk.on_event(StageStarted("embeddings"))
            copy_kept(walk, None)
            tables = _table_records(quantize_tables(walk, None))
            _sync(walk)
            walk.journal.append({"done": "outside", "tensors": tables})
    files = StreamFiles(
        walk.folder.hidden,
        walk.stores,
        two=walk.plan.follows_original,
        scratch_dtype=_scratch_dtype(walk),
    )
    with walk.timer.stage("embeddings"):
        streams = None
        if rows is not None and any(layer < walk.arch.n_layers for layer in layers if layer not in done):
            saved = [cast("int", e["layer"]) for e in walk.journal.of_kind("layer") if e.get("saved")]
            streams = files.open(rows, walk.arch, walk.source, after=max(saved, default=None))
    for layer in layers:
        if layer not in done:
            _layer(walk, layer, streams if layer < walk.arch.n_layers else None, files, n_tokens)
    if streams is not None:
        streams.close()
    return finish(walk, header, rows, base_dir, resumed=resumed)


def _scratch_dtype(walk: Walk) -> torch.dtype:
    """Of what a block reads, kept for all tokens: float32 if some linears of the source compute in it anywhere."""
    infos = walk.source.infos()
    stored = {infos[spec.name].dtype for spec in walk.arch.tensors() if spec.linear and spec.name in infos}
    return walk.machine.scratch_dtype if stored == {"BF16"} else torch.float32


def _rewind(walk: Walk, *, calibrated: bool) -> None:
    """Take back the layers behind the last saved border, unless all that need hidden states are done."""
    entries = walk.journal.entries
    layers = [entry["layer"] for entry in walk.journal.of_kind("layer")]
    if not calibrated or walk.arch.n_layers - 1 in layers:
        return
    kept = [number for number, entry in enumerate(entries, 1) if entry["done"] == "outside" or entry.get("saved")]
    walk.journal.rewind(max(kept, default=0))


def _layer(walk: Walk, layer: int, streams: Streams | None, files: StreamFiles, n_tokens: int) -> None:
    """Quantise one layer, bring it to the disk, and say so in the journal."""
    start = time.monotonic()
    sublayers = walk.arch.sublayers(layer)
    blocks = tuple(block for sublayer in sublayers for block in sublayer)
    records: list[list[object]] = []
    job = _layer_job(walk, layer, streams, files, records)
    _prefetch(walk, layer + 1)
    _prefetch(walk, layer + 2)
    with walk.timer.stage("layers" if streams is not None else "layers without calibration"):
        if streams is None:
            quantize_without_inputs(job, blocks)
        else:
            quantize_layer(job, sublayers)
        if walk.deliveries is not None:
            walk.deliveries.drain()
    with walk.timer.stage("copy"):
        copy_kept(walk, layer)
        records += _table_records(quantize_tables(walk, layer))
    with walk.timer.stage("sync"):
        _sync(walk)
        # Nothing needs the hidden states behind the last decoder layer.
        saved = streams is not None and layer < walk.arch.n_layers - 1 and files.due()
        if streams is not None and saved:
            files.save(streams, layer)
        walk.journal.append(
            {"done": "layer", "layer": layer, "saved": saved, "tensors": records, "experts": _expert_records(job)}
        )
        if saved:
            files.forget_before(layer)
    walk.on_event(LayerDone(layer, time.monotonic() - start, n_tokens if streams is not None else 0))


def _layer_job(
    walk: Walk,
    layer: int,
    streams: Streams | None,
    files: StreamFiles,
    records: list[list[object]],
) -> LayerJob:
    """What a layer needs of the walk. ``records``: see `_deliver`."""
    device, calibration = walk.machine.device, walk.plan.recipe.calibration
    carries_quantised = walk.plan.recipe.propagate == "quantized"
    return LayerJob(
        outputs=tuple(
            OutputJob(_methods(output), sink) for output, sink in zip(walk.plan.outputs, walk.sinks, strict=True)
        ),
        weights=LayerWeights(
            walk.source if walk.ahead is None else walk.ahead,
            walk.arch.parts(),
            carries_quantised=carries_quantised,
            cache_bytes=walk.share.cache,
            device=device,
        ),
        streams=streams,
        new_rows=files.scratch,
        deliver=_deliver(walk, records),
        on_stage=lambda stage, total: walk.on_event(StageStarted(stage, layer, total)),
        device=device,
        experts_at_once=walk.share.experts_at_once,
        min_expert_tokens=0 if calibration is None else calibration.min_expert_tokens,
        expect=(lambda names: None) if walk.ahead is None else walk.ahead.expect,
        importance=(lambda names: None) if walk.importance is None else partial(walk.importance.of, device=device),
    )


def _deliver(walk: Walk, records: list[list[object]]) -> Deliver:
    """What writes quantised linears, at once or beside the computation. ``records`` fills with what the journal says of
    each."""

    def write(output: int, batch: QuantizedBatch, names: tuple[str, ...], n_tokens: tuple[int, ...]) -> None:
        for tensor in batch.tensors(names, n_tokens):
            walk.sinks[output].write(tensor)
            records.append(_record(output, tensor.name, _told(walk, output, tensor)))
            if output == 0:
                nbytes = walk.plan.decision(tensor.name).source_nbytes
                walk.on_event(TensorDone(tensor.name, tensor.error.relative_loss, nbytes))

    deliveries = walk.deliveries
    if deliveries is None:
        return write

    def later(output: int, batch: QuantizedBatch, names: tuple[str, ...], n_tokens: tuple[int, ...]) -> None:
        deliveries.submit(partial(write, output, batch, names, n_tokens))

    return later


def _told(walk: Walk, output: int, tensor: QuantizedTensor) -> QuantError:
    """The error of a linear, which also says if an imatrix file was to weigh it, but does not know it."""
    mtp = walk.plan.outputs[output].decisions[tensor.name].spec.role is Role.MTP
    if walk.importance is None or mtp or not walk.importance.lacks(tensor.name):
        return tensor.error
    return replace(tensor.error, fallback="not in the imatrix: all inputs count alike")


def _record(output: int, name: str, error: QuantError) -> list[object]:
    """What the journal says of a quantised matrix."""
    return [output, name, error.relative_loss, error.n_tokens, error.fallback]


def _table_records(tables: list[tuple[int, str, QuantError]]) -> list[list[object]]:
    return [_record(*table) for table in tables]


def _expert_records(job: LayerJob) -> dict[str, list[list[object]]]:
    """What the journal says of each routed expert, by block."""
    return {
        name: [[count.n_tokens, count.gate_weight, count.borrowed] for count in counts]
        for name, counts in job.counts.items()
    }


def _layers(plan: Plan) -> list[int]:
    """Every layer that some output writes, MTP layers included, in order."""
    decisions = [d for output in plan.outputs for d in output.decisions.values() if d.action is not Action.DROP]
    return sorted({d.spec.layer for d in decisions if d.spec.layer is not None})


def _methods(output: OutputPlan) -> dict[str, tuple[ChosenScheme, Method]]:
    """Scheme and method of every linear that an output quantises."""
    return {
        name: (decision.scheme, decision.method)
        for name, decision in output.decisions.items()
        if decision.scheme is not None and not isinstance(decision.scheme, Float8Scheme) and decision.method is not None
    }


def _prefetch(walk: Walk, layer: int) -> None:
    """Let the kernel read the next layer's bytes while this one is computed."""
    decisions = walk.plan.outputs[0].decisions.values()
    names = dict.fromkeys(decision.spec.official for decision in decisions if decision.spec.layer == layer)
    walk.source.prefetch(list(names))


def _sync(walk: Walk) -> None:
    for sink in walk.sinks:
        sink.sync()


def _open_sink(folder: OutputFolder, output: OutputPlan, plan: Plan, source: Path, journal: Journal) -> Sink:
    sink = output.target.open_sink(result_folder(folder, plan, output), source, output.planned)
    if journal.entries and sink.fresh:
        raise OutputError(
            f"{folder.partial}: the files of the unfinished job are gone.", hint="Begin anew with --restart."
        )
    return sink
