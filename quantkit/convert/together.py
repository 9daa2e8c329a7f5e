"""What ranks must have in common before they begin: the same job, a folder that all of them see, and a recipe that can
be shared."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from quantkit.convert.prepare import Job
from quantkit.errors import OutputError, PlanError
from quantkit.formats.preallocated import disk_errors
from quantkit.plan.decide import Action
from quantkit.plan.recipe import Recipe
from quantkit.quantizers.rescaling import RescalingMethod
from quantkit.ranks.ranks import Ranks

PATIENCE_S = 10.0
"""So long a file of another host may take until it is seen: network file systems remember what was not there."""


def refuse_recipe(recipe: Recipe, count: int) -> None:
    """Raise `PlanError` for what a recipe asks of the whole model that runs in one process only. ``count``: ranks."""
    asked = {"tune": recipe.tune, "prune": recipe.prune, "router: least_squares": recipe.router != "keep"}
    found = [what for what, value in asked.items() if value]
    if found:
        raise PlanError(
            f"{', '.join(found)}: found with {count} ranks, runs in one process only.",
            hint="Leave --gpus out, or change the recipe.",
        )


def refuse_unshared(job: Job, ranks: Ranks) -> None:
    """Raise `PlanError` for what runs in one process only, and for fewer rows of text than ranks."""
    decisions = [decision for output in job.plan.outputs for decision in output.decisions.values()]
    methods = {decision.method for decision in decisions if decision.method is not None}
    layers = {d.spec.layer for d in decisions if d.spec.layer is not None and d.action is not Action.DROP}
    refuse_recipe(job.plan.recipe, ranks.count)
    found = {
        "output_aware": any(method.output_aware for method in methods),
        "a method that rescales channels (awq)": any(isinstance(method, RescalingMethod) for method in methods),
        "calibrated MTP layers": job.plan.calibrates_mtp,
        "layers that no output stores": job.rows is not None and not layers >= set(range(job.arch.n_layers)),
    }
    unshared = [what for what, asked in found.items() if asked]
    if unshared:
        raise PlanError(
            f"{', '.join(unshared)}: found with {ranks.count} ranks, runs in one process only.",
            hint="Leave --gpus out, or change the recipe.",
        )
    n_rows = ranks.count if job.rows is None else len(job.rows.tokens)
    if n_rows < ranks.count:
        raise PlanError(
            f"{n_rows} rows of calibration text for {ranks.count} ranks: each needs one.",
            hint="Take more tokens, shorter rows (sequence_length) or fewer ranks.",
        )


def refuse_different(ranks: Ranks, facts: Mapping[str, object]) -> None:
    """Raise `PlanError` if another rank has another version, recipe, source, text or device: the bytes would be of no
    job. ``facts``: such things by name, of `JobHeader.bytes_follow_from`."""
    if ranks.count == 1:
        return
    told = ranks.gathered(dict(facts))

    def check() -> None:
        first, own = told[0], told[ranks.number]
        different = sorted(key for key in first.keys() | own.keys() if first.get(key) != own.get(key))
        if different:
            named = "; ".join(
                f"{key} ({_short(own.get(key))}, rank 0 has {_short(first.get(key))})" for key in different
            )
            raise PlanError(
                f"another job than rank 0's: {named}.",
                hint="Start all ranks with the same command, version and files (and --jobs).",
            )

    ranks.agreed(check)


def _short(value: object) -> str:
    """A version, or the beginning of a digest."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def seen_by_all(folder: Path, ranks: Ranks) -> None:
    """Raise `OutputError` unless all ranks see what the first one writes into ``folder``."""
    token = folder / ranks.of_first(lambda: f"ranks-{secrets.token_hex(8)}")

    def write() -> None:
        with disk_errors(token):
            token.touch()

    ranks.agreed(lambda: write() if ranks.first else None)
    ranks.agreed(lambda: _require(token))
    if ranks.first:
        with disk_errors(token):
            token.unlink()


def _require(token: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not token.exists():
        if time.monotonic() > end:
            raise OutputError(
                f"{token.parent.parent}: what rank 0 writes there is not seen here.",
                hint="All ranks write into one folder: choose an -o on a file system that all hosts share.",
            )
        time.sleep(0.1)
