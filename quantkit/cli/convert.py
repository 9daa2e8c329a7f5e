"""``quantkit convert``: the whole job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.converted import program, report_document, report_text
from quantkit.cli.options import AsJson, Device, RecipeName, Source, size
from quantkit.cli.outcome import REFUSED, interruptible, refusals, show_error
from quantkit.cli.plan import show_plan
from quantkit.cli.progress import LiveProgress, PlainProgress
from quantkit.cli.render import show_json
from quantkit.pipeline.events import Event, Report
from quantkit.pipeline.recipe import Recipe
from quantkit.pipeline.recipe_file import load_recipe, recipe_path


def convert(
    source: Source,
    recipe: RecipeName,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to create. Work goes on in OUT.partial until it is complete.")
    ],
    device: Annotated[
        Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
    ] = Device.AUTO,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            "--memory-budget",
            parser=size,
            metavar="SIZE",
            help="Memory to stay within, e.g. 20GiB. Default: 60 % of the machine's memory.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, max=1024, metavar="N", help="CPU threads. Default: all cores.")
    ] = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart/--resume", help="Start anew and replace OUT; the default goes on where a killed run stopped."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan: the same as `quantkit plan`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantise a checkpoint by a recipe, layer by layer, and check the result against the original.

    A killed run continues with the same command, and its files are the same bytes as those of an unbroken one.
    """
    with refusals():
        loaded = load_recipe(recipe)
        if dry_run:
            show_plan(source, loaded, recipe, None, 0, as_json)
            return
        with interruptible(lambda: f"Resume with: {_resume_command(source, recipe, out)}"):
            report = _run(source, loaded, recipe_path(recipe).parent, out, device, memory_budget, jobs, restart)
    if as_json:
        show_json(report_document(report))
    else:
        typer.echo(report_text(report))
    if not report.validated:
        for output in report.outputs:
            for problem in output.validation.problems if output.validation else ():
                show_error(f"{output.path}: {problem}")
        show_error(
            "the result is kept but marked as not validated.",
            "Use more bits or more calibration text, or raise the recipe's limits.",
        )
        raise typer.Exit(REFUSED)


def _run(
    source: Path,
    recipe: Recipe,
    base_dir: Path,
    out: Path,
    device: Device,
    memory_budget: int | None,
    jobs: int | None,
    restart: bool,
) -> Report:
    # torch is loaded here, and not when --help or a plan is asked for.
    from quantkit.pipeline.run import convert as run

    progress = LiveProgress() if sys.stderr.isatty() else PlainProgress()
    with progress:

        def on_event(event: Event) -> None:
            progress(event)

        return run(
            source,
            recipe,
            out,
            base_dir=base_dir,
            device=device.value,
            memory_budget=memory_budget,
            jobs=jobs,
            restart=restart,
            on_event=on_event,
        )


def _resume_command(source: Path, recipe: str, out: Path) -> str:
    """The command that goes on, with this run's other options but never with --restart."""
    import shlex

    words = sys.argv[1:] if sys.argv[1:2] == ["convert"] else ["convert", str(source), "-r", recipe, "-o", str(out)]
    return f"{program()} {shlex.join(word for word in words if word != '--restart')}"
