"""What stays the same from the first tensor of a conversion to the last: the plan, and everything that is open."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.arch.base import ModelArch
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.convert.background import Deliveries
from quantkit.convert.events import OnEvent
from quantkit.convert.folder import OutputFolder
from quantkit.convert.journal import Journal
from quantkit.convert.pruning import Whole
from quantkit.convert.weights import WeightSource
from quantkit.formats.model_source import ModelSource
from quantkit.plan.batch_sizes import Share
from quantkit.plan.machine import Machine, Stores, Timer
from quantkit.plan.plan import Plan
from quantkit.plan.targets import Sink
from quantkit.ranks.ranks import ALONE, Ranks
from quantkit.sensitivity.open import Sensitivity


@dataclass(frozen=True, slots=True)
class Conversion:
    """Everything that is fixed or open from the first tensor of a conversion to the last.

    ``sinks``: one for each output of the plan, in its order. ``share``: how the memory budget is divided.
    ``sensitivity``: the Fisher pass that the recipe names. ``weights``: the source as layers read it, ahead of a GPU.
    ``importance``: an imatrix file in place of calibration text. ``deliveries``: the thread that writes beside a GPU,
    None where writing waits. ``whole``: the model before pruning, None if ``source`` is all of it. ``own_journal``:
    None on all ranks but the first, which keeps it.
    """

    plan: Plan
    arch: ModelArch
    source: ModelSource
    machine: Machine
    folder: OutputFolder
    own_journal: Journal | None
    stores: Stores
    share: Share
    sinks: tuple[Sink, ...]
    importance: ImportanceFile | None
    sensitivity: Sensitivity | None
    on_event: OnEvent
    timer: Timer
    weights: WeightSource
    deliveries: Deliveries | None
    whole: Whole | None = None
    ranks: Ranks = ALONE

    @property
    def journal(self) -> Journal:
        """The journal, on the first rank."""
        assert self.own_journal is not None, "the first rank keeps the journal"
        return self.own_journal
