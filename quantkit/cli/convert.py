"""``quantkit convert``: the whole job."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from quantkit import api as commands
from quantkit.arguments import let_threads_sleep
from quantkit.cli.converted import next_text, program
from quantkit.cli.exit_codes import REFUSED, interruptible, missing_option, refusals, show_error
from quantkit.cli.options import (
    AsJson,
    Cache,
    CacheDir,
    ConfigFolder,
    Data,
    Device,
    DeviceOption,
    Fit,
    FitContext,
    FormatName,
    GroupSize,
    Jobs,
    Kept,
    Layers,
    LogFile,
    MemoryBudget,
    MethodName,
    PresetName,
    PrintRecipe,
    Prune,
    Ranks,
    RecipeName,
    Restart,
    SchemeName,
    SensitivityFolder,
    Source,
    TargetBpw,
    TargetSize,
    Tokens,
    Tuned,
    chosen_recipe,
)
from quantkit.cli.plan import show_plan, show_recipe
from quantkit.cli.ranks import check_gpus, refuse_unshared, run_ranks, speaking
from quantkit.cli.render import show_json
from quantkit.convert.events import Report
from quantkit.convert.folder import is_begun
from quantkit.formats.remote.addresses import without_secrets
from quantkit.on_ranks import convert_on_ranks
from quantkit.plan.recipe import Recipe
from quantkit.plan.shorthand import Shorthand
from quantkit.plan.target_words import TargetWords
from quantkit.ranks.places import RankPlace, place_of
from quantkit.text.converted import report_document, report_text
from quantkit.text.progress import progress
from quantkit.text.trial import trial_text


def convert(
    source: Source,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to create. Work goes on in OUT.partial until it is complete."),
    ] = None,
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
    context: FitContext = None,
    tune: Tuned = False,
    config: ConfigFolder = None,
    prune: Prune = None,
    print_recipe: PrintRecipe = False,
    device: DeviceOption = Device.AUTO,
    memory_budget: MemoryBudget = None,
    jobs: Jobs = None,
    gpus: Ranks = None,
    restart: Restart = False,
    layers: Layers = None,
    cache: Cache = None,
    cache_dir: CacheDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan: the same as `quantkit plan`.")] = False,
    log: LogFile = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a checkpoint, layer by layer, and compare the result with the original.

    What is made: --scheme (vLLM, transformers), --preset (llama.cpp), a size (--fit, --target-bpw) or a --recipe.
    `quantkit quantize` is the same.

    A killed run resumes with the same command, and its files are byte for byte those of a run without interruption.
    """
    target = TargetWords(fit, context, target_bpw, target_size, format, sensitivity)
    shorthand = Shorthand(scheme, preset, group_size, method, tuple(data or ()), tokens, target, prune)
    kept, on = Kept(cache, cache_dir), device.value
    with refusals():
        refuse_unshared(gpus, layers, source)
        chosen = chosen_recipe(source, config, recipe, shorthand, cache_dir, tune=tune)
        if print_recipe or dry_run:
            name = None if print_recipe else recipe or shorthand.what
            _tell(source, config, chosen, name, as_json, memory_budget, on, jobs, kept)
            return
        if out is None:
            missing_option("'--out' / '-o'")
        if layers is not None:
            _try(source, config, chosen, out, layers, as_json, log, on, memory_budget, jobs, restart, kept)
            return
        named = (*(shorthand.words if recipe is None else ("-r", recipe)), *(["--tune"] if tune else []))
        report = _run(gpus, source, config, chosen, out, named, log, on, memory_budget, jobs, restart, kept)
    _show(source, report, as_json)


def _tell(
    source: str,
    config: Path | None,
    recipe: Recipe,
    name: str | None,
    as_json: bool,
    memory_budget: int | None,
    device: commands.DeviceName,
    jobs: int | None,
    kept: Kept,
) -> None:
    """Print what would be done: the plan of the recipe that the user knows by ``name``; without one the recipe."""
    if name is None:
        show_recipe(source, config, recipe, memory_budget, device, jobs, kept)
        return
    show_plan(source, recipe, name, as_json, kept, config=config, memory_budget=memory_budget, device=device, jobs=jobs)


def _run(
    gpus: int | None,
    source: str,
    config: Path | None,
    recipe: Recipe,
    out: Path,
    named: Sequence[str],
    log: Path | None,
    device: commands.DeviceName,
    memory_budget: int | None,
    jobs: int | None,
    restart: bool,
    kept: Kept,
) -> Report | None:
    """Convert everything: alone, as one of several ranks, or by starting them. None where another rank has the
    report."""
    place = place_of(os.environ)
    if place is not None:
        check_gpus(gpus, place)
        return _share(place, source, config, recipe, out, named, log, device, memory_budget, jobs, restart)
    if gpus is not None and gpus > 1:
        from quantkit.convert.together import refuse_recipe

        refuse_recipe(recipe, gpus)
        run_ranks(gpus, lambda: _advice(source, named, out))
    return _whole(source, config, recipe, out, named, log, device, memory_budget, jobs, restart, kept)


def _whole(
    source: str,
    config: Path | None,
    recipe: Recipe,
    out: Path,
    named: Sequence[str],
    log: Path | None,
    device: commands.DeviceName,
    memory_budget: int | None,
    jobs: int | None,
    restart: bool,
    kept: Kept,
) -> Report:
    """Convert everything. ``named``: the options that name the recipe."""
    with interruptible(lambda: _advice(source, named, out)), progress(log) as on_event:
        return commands.convert(
            source,
            recipe,
            out,
            config=config,
            device=device,
            memory_budget=memory_budget,
            jobs=jobs,
            restart=restart,
            cache=kept.nbytes,
            cache_dir=kept.folder,
            on_event=on_event,
        )


def _share(
    place: RankPlace,
    source: str,
    config: Path | None,
    recipe: Recipe,
    out: Path,
    named: Sequence[str],
    log: Path | None,
    device: commands.DeviceName,
    memory_budget: int | None,
    jobs: int | None,
    restart: bool,
) -> Report | None:
    """This rank's part of converting everything; rank 0 shows progress and has the report."""
    first = place.number == 0
    with ExitStack() as stack:
        stack.enter_context(interruptible(lambda: _advice(source, named, out), quiet=place.launched or not first))
        stack.enter_context(speaking(place))
        let_threads_sleep()
        from quantkit.ranks.connect import connected

        ranks = stack.enter_context(connected(place, device))
        return convert_on_ranks(
            source,
            recipe,
            out,
            ranks,
            config=config,
            memory_budget=memory_budget,
            jobs=jobs,
            restart=restart,
            on_event=stack.enter_context(progress(log)) if first else None,
        )


def _try(
    source: str,
    config: Path | None,
    recipe: Recipe,
    out: Path,
    layers: str,
    as_json: bool,
    log: Path | None,
    device: commands.DeviceName,
    memory_budget: int | None,
    jobs: int | None,
    restart: bool,
    kept: Kept,
) -> None:
    """Convert some layers, and print what was found."""
    with interruptible(lambda: "Nothing was written."), progress(log) as on_event:
        found = commands.trial(
            source,
            recipe,
            out,
            layers,
            config=config,
            device=device,
            memory_budget=memory_budget,
            jobs=jobs,
            restart=restart,
            cache=kept.nbytes,
            cache_dir=kept.folder,
            on_event=on_event,
        )
    if as_json:
        show_json(found.model_dump(mode="json"))
    else:
        typer.echo(trial_text(found, Path(f"{out}.trial.json")))


def _show(source: str, report: Report | None, as_json: bool) -> None:
    """Print the report; if a limit is exceeded say so last, and end with 1. None: another rank has it."""
    if report is None:
        return
    if as_json:
        show_json(report_document(report))
    else:
        typer.echo(f"{report_text(report)}\n\n{next_text(source, report)}")
    faults = [(output, fault) for output in report.outputs for fault in output.faults]
    for output, fault in faults:
        show_error(f"{output.path}: {fault}")
    if faults:
        show_error(
            "runtimes would not load the result: this is a bug of quantkit.", "Please report it with these lines."
        )
    if report.validated is not False:
        if faults:
            raise typer.Exit(REFUSED)
        return
    for output in report.outputs:
        for problem in output.validation.problems if output.validation else ():
            show_error(f"{output.path}: {problem}")
    show_error(
        "limits of the recipe exceeded: the result is kept, and marked as not validated.",
        "Use more bits or more calibration text, or raise the recipe's limits.",
    )
    raise typer.Exit(REFUSED)


def _advice(source: str, recipe: Sequence[str], out: Path) -> str:
    """What an interrupted user does next. ``recipe``: the options that name it."""
    if not is_begun(out):
        return "Nothing was begun: nothing is to be resumed or removed."
    return f"Resume with: {_resume_command(source, recipe, out)}"


def _resume_command(source: str, recipe: Sequence[str], out: Path) -> str:
    """The command that goes on, with this run's other options but never with --restart. ``recipe``: its options."""
    typed = sys.argv[1:2] in (["convert"], ["quantize"])
    words = sys.argv[1:] if typed else ["convert", source, *recipe, "-o", str(out)]
    return f"{program()} {shlex.join(without_secrets(word) for word in words if word != '--restart')}"
