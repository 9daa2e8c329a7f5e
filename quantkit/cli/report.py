"""``quantkit report``: one page about conversions and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.outcome import refusals
from quantkit.errors import OutputError


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
            "--out", "-o", metavar="FILE", help="File to write. Default: report.html; markdown goes to stdout."
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write markdown for a model card in place of the HTML page.")
    ] = False,
    title: Annotated[str | None, typer.Option("--title", help="Heading. Default: what the checkpoints are.")] = None,
) -> None:
    """Explain what conversions and evaluations found, in one HTML file that needs no network, or as markdown.

    Sizes by role, loss of each layer and projection, tokens of each expert, divergence from the original, size against
    quality of several outputs, recipe, provenance. Only the JSON documents are read, not the weights.
    """
    with refusals():
        from quantkit.report.build import report_of
        from quantkit.report.documents import read_documents
        from quantkit.report.markdown import markdown as markdown_of
        from quantkit.report.outcomes import outcomes_of

        found = read_documents(documents)
        contents = report_of(outcomes_of(found), title)
        if markdown and out is None:
            typer.echo(markdown_of(contents), nl=False)
            return
        path = Path("report.html") if out is None else out
        _refuse_to_lose(path, [file.path for file in found])
        if markdown:
            text = markdown_of(contents)
        else:
            from quantkit.report.page import page

            text = page(contents)
        _write(path, text)
    typer.echo(f"{path}  {len(text.encode()) / 1e6:.1f} MB")


def _refuse_to_lose(path: Path, documents: list[Path]) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path}: is no place for a file.", hint="Give -o a file name in a folder that exists.")
    if path.resolve() in (document.resolve() for document in documents):
        raise OutputError(f"{path}: is a document that the report is made of.", hint="Give -o another file name.")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}.") from error
