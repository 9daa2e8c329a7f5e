"""A recipe with targets -> the same with ordinary rules. Losses of types that the folder of the Fisher pass does not
hold yet are measured first, which takes weights and torch; all else takes neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.documents.sensitivity import SensitivityDocument, read_sensitivity
from quantkit.errors import PlanError
from quantkit.formats.storage import LOCAL, Storage
from quantkit.plan.allocation.choose import Choice, choose
from quantkit.plan.allocation.draft import OpenOutput, draft_of
from quantkit.plan.headers import SourceHeaders, read_headers
from quantkit.plan.recipe import Recipe
from quantkit.plan.same_model import check_model, fingerprint_of
from quantkit.schemes import ChosenScheme
from quantkit.sensitivity.events import LossesLayer, OnLosses
from quantkit.sensitivity.folder import add_losses, locked

if TYPE_CHECKING:
    from quantkit.plan.machine import Machine

Missing = Mapping[str, Mapping[str, ChosenScheme]]
OpenMachine = Callable[[], "AbstractContextManager[Machine]"]
"""Finds the machine that measures, and limits its threads until it is closed. Not called if nothing is missing."""


@dataclass(frozen=True, slots=True)
class Settled:
    """``recipe``: without targets; ``choices``: by the name of the output, of those that had one."""

    recipe: Recipe
    choices: Mapping[str, Choice]


def settle(
    source: Path,
    config: Path | None,
    recipe: Recipe,
    base_dir: Path,
    machine: OpenMachine,
    on_event: OnLosses | None,
    storage: Storage = LOCAL,
) -> Settled:
    """Choose the types of every output that has a target. ``config``: see `open_model`; ``machine``: measures
    what is missing; ``storage``: opens the source's shards.

    Raises `OutputError` or `SourceError` for a folder that holds no finished pass of this model, `PlanError` for what
    cannot be planned, and for a target that no choice keeps.
    """
    if recipe.sensitivity is None or all(output.target is None for output in recipe.outputs):
        return Settled(recipe, {})
    headers, folder = read_headers(source, config, storage), base_dir / recipe.sensitivity
    document = read_sensitivity(folder)
    check_model(folder, document, fingerprint_of(headers, storage), headers.arch)
    drafts = [draft_of(o, recipe, headers, document.linears) for o in recipe.outputs if o.target is not None]
    if missing := _missing(drafts, document):
        if not headers.has_shards:
            types = sorted({label for schemes in missing.values() for label in schemes})
            raise PlanError(
                f"{folder}: lacks the losses of {', '.join(types)}, and {source} holds no weights to measure them.",
                hint="Make the plan once where the checkpoint is; the folder keeps them.",
            )
        with machine() as found:
            document = _measured(headers, folder, drafts, found, on_event, storage)
    choices = {d.output.name: choose(d, document, headers.arch, headers.directory) for d in drafts}
    outputs = tuple(choices[o.name].output if o.name in choices else o for o in recipe.outputs)
    return Settled(recipe.model_copy(update={"outputs": outputs}), choices)


def _missing(drafts: list[OpenOutput], document: SensitivityDocument) -> Missing:
    """What the drafts need and the document lacks."""
    known = document.losses or {}
    missing: dict[str, dict[str, ChosenScheme]] = {}
    for draft in drafts:
        for name, schemes in draft.needed().items():
            lacking = {label: scheme for label, scheme in schemes.items() if label not in known.get(name, {})}
            if lacking:
                missing.setdefault(name, {}).update(lacking)
    return missing


def _measured(
    headers: SourceHeaders,
    folder: Path,
    drafts: list[OpenOutput],
    machine: Machine,
    on_event: OnLosses | None,
    storage: Storage,
) -> SensitivityDocument:
    """The document with what was missing. The folder keeps it layer by layer, so that an interrupted call goes on
    after the last one."""
    from quantkit.formats import open_source
    from quantkit.sensitivity.losses import measure_losses
    from quantkit.sensitivity.open import open_sensitivity

    with open_source(headers.directory, storage) as opened, locked(folder):
        # Read once more: before the lock was ours, another process may have added some.
        found = open_sensitivity(folder, opened, headers.arch)
        missing, keep = _missing(drafts, found.document), partial(add_losses, folder)

        def on_layer(done: int, layers: int) -> None:
            if on_event is not None:
                on_event(LossesLayer(done, layers))

        return measure_losses(found, opened, machine, missing, keep, on_layer)
