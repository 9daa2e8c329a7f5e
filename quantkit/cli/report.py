"""``quantkit report``: one page about conversions and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api as commands
from quantkit.cli.exit_codes import refusals
from quantkit.cli.options import Force


def report(
    documents: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT",
            help="Output folders of `quantkit convert`, and JSON documents that `quantkit evaluate -o` wrote.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="File to write: .html, or .md for markdown. Default: report.html; markdown goes to stdout.",
        ),
    ] = None,
    force: Force = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write markdown for a model card in place of the HTML page.")
    ] = False,
    title: Annotated[str | None, typer.Option("--title", help="Heading. Default: what the checkpoints are.")] = None,
) -> None:
    """Show what conversions did and evaluations measured, in one HTML file that needs no network, or as markdown.

    Sizes by role, loss of each layer and projection, tokens of each expert, divergence from the original, size against
    quality of several outputs, recipe, provenance. Only the JSON documents are read, not the weights.
    """
    with refusals():
        if markdown and out is None:
            typer.echo(commands.report(documents, markdown=True, title=title), nl=False)
            return
        path = Path("report.html") if out is None else out
        text = commands.report(documents, path, markdown=markdown or None, title=title, force=force)
    typer.echo(f"{path}  {len(text.encode()) / 1e6:.1f} MB")
