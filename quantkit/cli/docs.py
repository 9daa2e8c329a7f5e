"""``quantkit docs``: the pages of the documentation, where no checkout is at hand."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from quantkit.cli.exit_codes import refusals
from quantkit.text.pages import page_text, page_titles
from quantkit.text.tables import table


def docs(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A page, e.g. tutorial. Default: list them.")
    ] = None,
) -> None:
    """Show a page of the documentation. A terminal gets it set and paged, a pipe or a file as markdown."""
    with refusals():
        if name is None:
            typer.echo(table(("page", "title"), page_titles(), left=2))
            return
        text = page_text(name)
    if sys.stdout.isatty():
        _show_page(text)
    else:
        typer.echo(text, nl=False)


def _show_page(text: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    os.environ.setdefault("LESS", "FRX")  # pass colours on, and end at once where the page fits the screen
    console = Console()
    with console.pager(styles=True):
        console.print(Markdown(text))
