"""``quantkit convert``: the whole job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit import api as commands
from quantkit.cli.converted import next_text, program
from quantkit.cli.exit_codes import REFUSED, interruptible, refusals, show_error
from quantkit.cli.options import AsJson, Device, DeviceOption, MemoryBudget, RecipeName, Source
from quantkit.cli.plan import show_plan
from quantkit.cli.render import show_json
from quantkit.text.converted import report_document, report_text
from quantkit.text.progress import progress


def convert(
    source: Source,
    recipe: RecipeName,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to create. Work goes on in OUT.partial until it is complete.")
    ],
    device: DeviceOption = Device.AUTO,
    memory_budget: MemoryBudget = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, max=1024, metavar="N", help="CPU threads. Default: all cores.")
    ] = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart/--resume", help="Start anew and replace OUT; the default resumes where a killed run stopped."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan: the same as `quantkit plan`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantise a checkpoint by a recipe, layer by layer, and check the result against the original.

    A killed run resumes with the same command, and its files are byte for byte those of a run without interruption.
    """
    with refusals():
        if dry_run:
            show_plan(source, recipe, as_json, memory_budget=memory_budget)
            return
        with interruptible(lambda: f"Resume with: {_resume_command(source, recipe, out)}"), progress() as on_event:
            report = commands.convert(
                source,
                recipe,
                out,
                device=device.value,
                memory_budget=memory_budget,
                jobs=jobs,
                restart=restart,
                on_event=on_event,
            )
    if as_json:
        show_json(report_document(report))
    else:
        typer.echo(f"{report_text(report)}\n\n{next_text(report)}")
    if not report.validated:
        for output in report.outputs:
            for problem in output.validation.problems if output.validation else ():
                show_error(f"{output.path}: {problem}")
        show_error(
            "the result is kept but marked as not validated.",
            "Use more bits or more calibration text, or raise the recipe's limits.",
        )
        raise typer.Exit(REFUSED)


def _resume_command(source: Path, recipe: str, out: Path) -> str:
    """The command that goes on, with this run's other options but never with --restart."""
    import shlex

    words = sys.argv[1:] if sys.argv[1:2] == ["convert"] else ["convert", str(source), "-r", recipe, "-o", str(out)]
    return f"{program()} {shlex.join(word for word in words if word != '--restart')}"
