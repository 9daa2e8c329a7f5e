"""Opens what a conversion works with: OUT.partial with its journal, the files of the outputs, what the recipe names,
and the threads that read and write. Of several ranks the first makes the files, and the others find them there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.convert.background import AheadSource, Deliveries, DirectSource
from quantkit.convert.conversion import Conversion
from quantkit.convert.events import OnEvent
from quantkit.convert.finish import result_folder
from quantkit.convert.folder import OutputFolder, is_begun
from quantkit.convert.journal import Journal
from quantkit.convert.prepare import Job
from quantkit.convert.pruning import Whole
from quantkit.convert.repack import refuse_misfits
from quantkit.convert.together import seen_by_all
from quantkit.convert.weights import WeightSource
from quantkit.documents.journal import JournalHeader
from quantkit.errors import OutputError
from quantkit.formats.model_source import ModelSource
from quantkit.plan.batch_sizes import share_on_ranks
from quantkit.plan.machine import Machine, Stores, Timer
from quantkit.plan.memory import check_free_disk
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.targets import Sink
from quantkit.ranks.ranks import ALONE, Ranks
from quantkit.sensitivity.open import Sensitivity, open_sensitivity


def open_folder(stack: ExitStack, job: Job, header: JournalHeader, ranks: Ranks) -> tuple[OutputFolder, Journal | None]:
    """OUT.partial, locked by the first rank, and that rank's journal (None elsewhere, and of a finished job), until
    ``stack`` is closed."""
    names = [output.output.name for output in job.plan.outputs]

    def begun() -> tuple[OutputFolder, Journal | None]:
        if not is_begun(job.out) and job.plan.recipe.prune is None:
            refuse_misfits(job.source, job.plan)
        folder = stack.enter_context(OutputFolder(job.out, names, restart=job.restart))
        if folder.finished:
            return folder, None
        journal = Journal(folder.journal, header, job.source.files[0].parent)
        stack.callback(journal.close)
        if not journal.entries:
            check_free_disk(job.needs, folder.partial, folder.reserved_bytes)
        return folder, journal

    own = ranks.agreed(lambda: begun() if ranks.first else None)
    if own is None:
        own = OutputFolder.of_first_rank(job.out, names), None
    if ranks.count > 1 and not ranks.of_first(lambda: own[0].finished):
        seen_by_all(own[0].hidden, ranks)
    return own


def open_conversion(
    stack: ExitStack,
    job: Job,
    machine: Machine,
    folder: OutputFolder,
    journal: Journal | None,
    importance: ImportanceFile | None,
    sensitivity: Sensitivity | None,
    on_event: OnEvent,
    whole: Whole | None,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Open what a conversion works with, until ``stack`` is closed. ``journal``: the first rank's."""
    plan, share = job.plan, share_on_ranks(job.needs, machine.hardware, ranks.count)
    weights, deliveries = _threads_beside(stack, job.source, machine)
    return Conversion(
        plan=plan,
        arch=job.arch,
        source=job.source,
        machine=machine,
        folder=folder,
        own_journal=journal,
        stores=Stores(folder.hidden, share.stores, machine.device, share.device_stores, ranks.number),
        share=share,
        sinks=_open_sinks(stack, folder, plan, job.source.directory, journal, ranks),
        importance=importance,
        sensitivity=sensitivity,
        on_event=on_event,
        timer=Timer(),
        weights=weights,
        deliveries=deliveries,
        whole=whole,
        ranks=ranks,
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


def _open_sinks(
    stack: ExitStack, folder: OutputFolder, plan: Plan, source: Path, journal: Journal | None, ranks: Ranks
) -> tuple[Sink, ...]:
    """One for each output. The first rank makes the files before the others open them."""

    def opened() -> tuple[Sink, ...]:
        sinks = tuple(_open_sink(folder, output, plan, source, journal) for output in plan.outputs)
        for sink in sinks:
            stack.callback(sink.close)
        return sinks

    own = ranks.agreed(lambda: opened() if ranks.first else None)
    others = ranks.agreed(lambda: None if ranks.first else opened())
    found = others if own is None else own
    assert found is not None, "either the first rank or another"
    return found


def _open_sink(folder: OutputFolder, output: OutputPlan, plan: Plan, source: Path, journal: Journal | None) -> Sink:
    sink = output.target.open_sink(result_folder(folder, plan, output), source, output.planned)
    if sink.fresh and (journal is None or journal.entries):
        raise OutputError(
            f"{folder.partial}: the files of the unfinished job are gone.", hint="Begin anew with --restart."
        )
    return sink
