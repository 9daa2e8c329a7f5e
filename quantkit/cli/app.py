"""``quantkit``: commands, exit codes, errors.

Exit codes: 0 done; 1 refused or failed its recipe's limits (one line and a hint, no traceback); 2 wrong usage; 130
interrupted. An exception that is no `QuantkitError` is our bug and keeps its traceback. See `exit_codes`.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from quantkit.cli import (
    calibration,
    check,
    convert,
    docs,
    evaluate,
    inspect,
    plan,
    recipes,
    report,
    sensitivity,
    verify,
)
from quantkit.cli.exit_codes import Commands
from quantkit.cli.options import ManyFiles
from quantkit.version import __version__

app = typer.Typer(
    name="quantkit",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Stream a Mixture-of-Experts checkpoint larger than memory through quantisation, and measure the result."""


for name in ("convert", "quantize"):
    app.command(name, cls=ManyFiles)(convert.convert)
app.command("plan", cls=ManyFiles)(plan.plan)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("evaluate")(evaluate.evaluate)
app.command("sensitivity", cls=ManyFiles)(sensitivity.sensitivity)
app.command("check")(check.check)
app.command("report")(report.report)
app.add_typer(calibration.app, name="calibration")
app.add_typer(recipes.app, name="recipes")
app.command("docs")(docs.docs)


def main() -> None:
    """Run the command that the process was started with. Does not return."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that is not UTF-8 gets \u4e2d for what it cannot show, as Python does on stderr: no traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
