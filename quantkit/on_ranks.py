"""`quantkit.convert` called by several processes that share the work."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.arguments import (
    conversion_budget,
    optional_path,
    output_folder,
    path_of,
    recipe_and_folder,
    settled,
    threads,
)
from quantkit.errors import PlanError
from quantkit.formats.remote.addresses import is_remote, without_secrets
from quantkit.formats.storage import LOCAL

if TYPE_CHECKING:
    from quantkit.convert.events import OnEvent, Report
    from quantkit.plan.recipe import Recipe
    from quantkit.ranks.ranks import Ranks


def refuse_address(source: Path | str) -> None:
    """Raise `PlanError` for a source that is an address. Ranks would each fetch it, into caches of their own."""
    if is_remote(str(source)):
        raise PlanError(
            f"{without_secrets(str(source))}: found an address, needed a folder: several ranks do not read addresses.",
            hint="Leave --gpus out, or fetch the checkpoint to a disk that all ranks see.",
        )


def convert_on_ranks(
    source: Path | str,
    recipe: Recipe | Path | str,
    out: Path | str,
    ranks: Ranks,
    *,
    config: Path | str | None = None,
    base_dir: Path | str | None = None,
    memory_budget: int | str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    on_event: OnEvent | None = None,
) -> Report | None:
    """`convert`, called with the same arguments by several processes that `quantkit.ranks.connect.connected` has
    joined. They share the work, and the files have the bytes of one process. Rank 0 validates and gets the report, the
    others None before that.

    ``memory_budget``: of all ranks of a host together. Raises `QuantkitError`: what every rank would say rank 0 does,
    the others raise `RankLostError`.
    """
    from quantkit.convert.fingerprint import sha256_of_text
    from quantkit.convert.prepare import prepared
    from quantkit.convert.together import refuse_different

    ranks.agreed(lambda: refuse_address(source))
    loaded, folder = ranks.agreed(lambda: recipe_and_folder(recipe, base_dir))
    device = "cuda" if ranks.device.type == "cuda" else "cpu"
    budget = ranks.agreed(lambda: conversion_budget(device, jobs, memory_budget)) // ranks.on_host
    given, place = path_of(source), optional_path(config)
    refuse_different(ranks, {"recipe": sha256_of_text(loaded.model_dump_json())})
    plain = ranks.of_first(lambda: settled(given, place, loaded, folder, device, budget, jobs, on_event, LOCAL).recipe)
    with ExitStack() as stack:
        job = prepared(given, place, plain, output_folder(out), folder, budget, restart=restart)
        found = ranks.agreed(lambda: stack.enter_context(job))
        stack.enter_context(threads(jobs))
        from quantkit.convert.events import ignore
        from quantkit.convert.run import convert_on_ranks as run
        from quantkit.plan.machine import Machine

        return run(found, Machine(ranks.device, budget), on_event or ignore, ranks)
