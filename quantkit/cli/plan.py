"""``quantkit plan``: exact sizes, needs and fit of a conversion, from headers alone."""

from __future__ import annotations

from pathlib import Path

import typer

from quantkit import api as commands
from quantkit.cli.exit_codes import refusals
from quantkit.cli.options import (
    AsJson,
    Cache,
    CacheDir,
    ConfigFolder,
    Context,
    ConvertOn,
    Data,
    Device,
    DeviceOption,
    Fit,
    FormatName,
    GpuOption,
    GroupSize,
    Jobs,
    Kept,
    MemoryBudget,
    MethodName,
    PresetName,
    PrintRecipe,
    Prune,
    RecipeName,
    SchemeName,
    SensitivityFolder,
    Source,
    TargetBpw,
    TargetSize,
    Tokens,
    Tuned,
    chosen_recipe,
)
from quantkit.cli.render import show_json
from quantkit.making_recipes import choose_types
from quantkit.plan.hardware import Gpu
from quantkit.plan.recipe import Recipe
from quantkit.plan.shorthand import Shorthand, recipe_yaml
from quantkit.plan.target_words import TargetWords
from quantkit.runtimes.gpus import Gpus, parse_gpus
from quantkit.text.progress import progress


def plan(
    source: Source,
    recipe: RecipeName = None,
    scheme: SchemeName = None,
    preset: PresetName = None,
    group_size: GroupSize = None,
    method: MethodName = None,
    data: Data = None,
    tokens: Tokens = None,
    fit: Fit = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    format: FormatName = None,
    sensitivity: SensitivityFolder = None,
    tune: Tuned = False,
    config: ConfigFolder = None,
    prune: Prune = None,
    print_recipe: PrintRecipe = False,
    gpus: GpuOption = None,
    context: Context = None,
    memory_budget: MemoryBudget = None,
    convert_on: ConvertOn = None,
    device: DeviceOption = Device.AUTO,
    jobs: Jobs = None,
    cache: Cache = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Say what a conversion would give and need: bytes, bits per weight, memory, disk, hours on this machine.

    The first plan on a machine measures it for some seconds, and keeps that in the cache folder; a size may need the
    losses of types, which --device measures. SOURCE may hold only a
    config.json: then the official release of that config is planned.
    """
    target = TargetWords(fit, None if fit is None else context, target_bpw, target_size, format, sensitivity)
    shorthand = Shorthand(scheme, preset, group_size, method, tuple(data or ()), tokens, target, prune)
    kept = Kept(cache, cache_dir)
    with refusals():
        chosen = chosen_recipe(source, config, recipe, shorthand, cache_dir, tune=tune)
        if print_recipe:
            show_recipe(source, config, chosen, memory_budget, device.value, jobs, kept)
            return
        show_plan(
            source,
            chosen,
            recipe or shorthand.what,
            as_json,
            kept,
            config=config,
            gpus=parse_gpus(fit) if gpus is None and fit is not None else gpus,
            context=context,
            memory_budget=memory_budget,
            convert_on=convert_on,
            device=device.value,
            jobs=jobs,
        )


def show_recipe(
    source: str,
    config: Path | None,
    recipe: Recipe,
    memory_budget: int | None,
    device: commands.DeviceName,
    jobs: int | None,
    kept: Kept,
) -> None:
    """Print a recipe, with rules in place of targets."""
    with progress() as on_event:
        settled = choose_types(
            source,
            recipe,
            config=config,
            device=device,
            memory_budget=memory_budget,
            jobs=jobs,
            cache=kept.nbytes,
            cache_dir=kept.folder,
            on_event=on_event,
        )
    typer.echo(recipe_yaml(settled), nl=False)


def show_plan(
    source: str,
    recipe: Recipe,
    name: str,
    as_json: bool,
    kept: Kept,
    *,
    config: Path | None = None,
    gpus: Gpus | None = None,
    context: int | None = None,
    memory_budget: int | None = None,
    convert_on: Gpu | None = None,
    device: commands.DeviceName = "auto",
    jobs: int | None = None,
) -> None:
    """Make the plan and print it; what `plan` and `convert --dry-run` have in common. ``name``: the recipe as given."""
    from quantkit.text.forecast import forecast_document, forecast_text

    with progress() as on_event:
        found = commands.plan(
            source,
            recipe,
            config=config,
            gpus=gpus,
            context=context,
            memory_budget=memory_budget,
            convert_on=convert_on,
            hours=True,
            device=device,
            jobs=jobs,
            cache=kept.nbytes,
            cache_dir=kept.folder,
            on_event=on_event,
        )
    if as_json:
        show_json(forecast_document(found, name))
    else:
        typer.echo(forecast_text(found))
