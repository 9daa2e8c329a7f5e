"""The source of a conversion without the experts that score least."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.arch.base import ModelArch, RoutedExperts
from quantkit.convert.events import OnEvent
from quantkit.convert.folder import OutputFolder
from quantkit.convert.prepare import Job
from quantkit.convert.repack import refuse_misfits
from quantkit.convert.scoring import Scoring
from quantkit.documents.pruning import PruningRecord, Scores
from quantkit.formats.model_source import ModelSource
from quantkit.formats.pruned_source import PrunedSource
from quantkit.plan.batch_sizes import share_of
from quantkit.plan.machine import Machine, Stores
from quantkit.plan.pruning import kept_experts, layers_to_score, pruned_config, pruned_view


@dataclass(frozen=True, slots=True)
class Whole:
    """The model before pruning: what a result is compared with. ``record``: what was pruned."""

    arch: ModelArch
    source: ModelSource
    record: PruningRecord


def without_experts(job: Job, folder: OutputFolder, machine: Machine, on_event: OnEvent) -> tuple[Job, Whole | None]:
    """The job with the source of the model that is left, and the whole model; the job as it is if nothing is pruned.
    Experts are scored now, unless that was done. Raises as `Scoring.run` and `refuse_misfits` do."""
    if job.plan.recipe.prune is None:
        return job, None
    scores = _scored(job, folder, machine, on_event) if job.scores is None else job.scores
    experts, left = job.whole.routed_experts(), job.arch.routed_experts()
    assert experts is not None, "the plan has refused a model without routed experts"
    assert left is not None, "some experts stay"
    kept = _kept(scores, experts, left.count)
    config = pruned_config(job.source.config, experts, left.count)
    source = PrunedSource(job.source, pruned_view(job.whole, kept), config)
    refuse_misfits(source, job.plan)
    record = PruningRecord(experts=experts.count, kept=kept, scores=scores)
    return replace(job, source=source), Whole(job.whole, job.source, record)


def _scored(job: Job, folder: OutputFolder, machine: Machine, on_event: OnEvent) -> Scores:
    assert job.rows is not None, "a recipe that prunes has text or scores"
    share = share_of(job.needs, machine.hardware)
    stores = Stores(folder.hidden, share.stores, machine.device, share.device_stores)
    scratch = folder.hidden / "scoring"
    scoring = Scoring(
        job.whole, job.source, job.rows, machine, stores, share.cache // 2, folder.scores, scratch, on_event
    )
    return scoring.run(layers_to_score(job.plan))


def _kept(scores: Scores, experts: RoutedExperts, left: int) -> dict[int, tuple[int, ...]]:
    return {layer: kept_experts([e.score for e in own], experts, left) for layer, own in scores.items()}
