"""Recipes from options, and recipes whose targets have become rules, as functions. They keep the conventions of
`quantkit.api`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantkit.arguments import opened_places, optional_path, recipe_and_folder, settled

if TYPE_CHECKING:
    from quantkit.plan.recipe import Recipe
    from quantkit.sensitivity.events import OnLosses


def recipe_for(
    source: Path | str,
    *,
    scheme: str | None = None,
    preset: str | None = None,
    group_size: int | None = None,
    method: str | None = None,
    data: str | Sequence[str] = (),
    tokens: int | None = None,
    fit: str | None = None,
    context: int | None = None,
    target_bpw: float | None = None,
    target_size: str | None = None,
    format: str | None = None,
    sensitivity: Path | str | None = None,
    prune: str | int | None = None,
    tune: bool = False,
    cache_dir: Path | str | None = None,
) -> Recipe:
    """The recipe that ``scheme`` ("w4a16", for vLLM), ``preset`` ("Q4_K_M", for llama.cpp) or a size stands for on a
    model.

    ``group_size``: of a scheme, -1 for one scale a row; ``method``: "gptq" (default), "awq" or "rtn"; ``data``:
    calibration text, relative to the current folder (default: builtin:mixed); ``tokens``: how much of it. A size is one
    of ``fit`` ("5xA100-80GB", with a sequence of ``context`` tokens), ``target_bpw`` and ``target_size`` ("350GB"), of
    an output in ``format`` ("compressed-tensors" or "gguf"), and needs the folder ``sensitivity``; `choose_types` puts
    rules in its place. ``prune``: routed experts of each layer that go, "25%" or 64; ``tune``: whole layers by
    gradients. Raises `QuantkitError`.
    """
    from quantkit.plan.shorthand import Shorthand, shorthand_recipe
    from quantkit.plan.target_words import TargetWords

    text = (data,) if isinstance(data, str) else tuple(data)
    folder = None if sensitivity is None else str(sensitivity)
    target = TargetWords(fit, context, target_bpw, target_size, format, folder)
    words = Shorthand(scheme, preset, group_size, method, text, tokens, target, None if prune is None else str(prune))
    with opened_places(source, cache_dir=cache_dir) as opened:
        (given,) = opened.folders
        found = shorthand_recipe(given, words)
    return found.tuned() if tune else found


def choose_types(
    source: Path | str,
    recipe: Recipe | Path | str,
    *,
    config: Path | str | None = None,
    base_dir: Path | str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    memory_budget: int | str | None = None,
    jobs: int | None = None,
    cache: int | str | None = None,
    cache_dir: Path | str | None = None,
    on_event: OnLosses | None = None,
) -> Recipe:
    """The recipe with rules in place of targets: the type of each linear, chosen so that the output keeps its size and
    is predicted to lose least. A recipe without targets comes back as it is.

    Losses that the recipe's folder of sensitivity lacks are measured on ``device``, with ``jobs`` CPU threads,
    and kept there; ``on_event``: is told of each layer. `convert`, `trial` and `plan` do the same on their way. Raises
    `QuantkitError`.
    """
    from quantkit.plan.budget import budget_bytes

    loaded, folder = recipe_and_folder(recipe, base_dir)
    budget = budget_bytes(memory_budget)
    with opened_places(source, cache=cache, cache_dir=cache_dir) as opened:
        (given,), storage = opened.folders, opened.storage
        return settled(given, optional_path(config), loaded, folder, device, budget, jobs, on_event, storage).recipe
