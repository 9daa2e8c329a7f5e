"""A recipe with targets -> the same with ordinary rules. Losses of types that the folder of the Fisher pass does not
hold yet are measured first, which takes weights and torch; all else takes neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.documents.sensitivity import SensitivityDocument, read_sensitivity
from quantkit.errors import PlanError
from quantkit.formats.storage import LOCAL, Storage
from quantkit.plan.allocation.choose import Choice, choose
from quantkit.plan.allocation.draft import OpenOutput, draft_of
from quantkit.plan.gguf_model import open_model
from quantkit.plan.headers import SourceHeaders, read_headers
from quantkit.plan.recipe import Recipe
from quantkit.schemes import ChosenScheme
from quantkit.sensitivity.events import LossesLayer, OnLosses
from quantkit.sensitivity.folder import add_losses
from quantkit.sensitivity.same_model import check_model

if TYPE_CHECKING:
    from quantkit.plan.machine import Machine

Missing = Mapping[str, Mapping[str, ChosenScheme]]


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
    *,
    device: str,
    memory_budget: int | None,
    on_event: OnLosses | None,
    storage: Storage = LOCAL,
) -> Settled:
    """Choose the types of every output that has a target. ``config``: see `open_model`; ``memory_budget``:
    bytes, None for the usual; ``storage``: opens the source's shards.

    Raises `OutputError` or `SourceError` for a folder that holds no finished pass of this model, `PlanError` for what
    cannot be planned, and for a target that no choice keeps.
    """
    if recipe.sensitivity is None or all(output.target is None for output in recipe.outputs):
        return Settled(recipe, {})
    headers, folder = read_headers(source, config, storage), base_dir / recipe.sensitivity
    document = read_sensitivity(folder)
    check_model(folder, document, _fingerprint(source, config, headers, storage), headers.arch)
    drafts = [draft_of(o, recipe, headers, document.linears) for o in recipe.outputs if o.target is not None]
    missing = _missing(drafts, document)
    if missing:
        if not headers.has_shards:
            types = sorted({label for schemes in missing.values() for label in schemes})
            raise PlanError(
                f"{folder}: lacks the losses of {', '.join(types)}, and {source} holds no weights to measure them.",
                hint="Make the plan once where the checkpoint is; the folder keeps them.",
            )
        from quantkit.plan.machine import Machine

        document = _measured(headers, folder, missing, Machine.of(device, memory_budget), on_event, storage)
    choices = {d.output.name: choose(d, document, headers.arch, headers.directory) for d in drafts}
    outputs = tuple(choices[o.name].output if o.name in choices else o for o in recipe.outputs)
    return Settled(recipe.model_copy(update={"outputs": outputs}), choices)


def _fingerprint(source: Path, config: Path | None, headers: SourceHeaders, storage: Storage) -> str | None:
    if not headers.has_shards:
        return None
    with open_model(source, config, storage) as opened:
        return opened.fingerprint()


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
    missing: Missing,
    machine: Machine,
    on_event: OnLosses | None,
    storage: Storage,
) -> SensitivityDocument:
    """The document with what was missing, which the folder keeps."""
    from quantkit.formats import open_source
    from quantkit.sensitivity.losses import measure_losses
    from quantkit.sensitivity.open import open_sensitivity

    with open_source(headers.directory, storage) as opened:
        found = open_sensitivity(folder, opened, headers.arch)

        def on_layer(done: int, layers: int) -> None:
            if on_event is not None:
                on_event(LossesLayer(done, layers))

        document = measure_losses(found, opened, machine, missing, on_layer)
    add_losses(folder, document)
    return document
