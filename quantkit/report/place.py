"""Where a report may be written, and in which form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.formats.preallocated import check_place, disk_errors

HTML, MARKDOWN = (".html", ".htm"), (".md", ".markdown")
_HEAD = 2**16
"""Characters that hold a page's head, up to its style."""
_ABOUT = re.compile(r'<meta name="description" content="([^"]*)">')


def is_markdown(path: Path | None, documents: Sequence[Path], asked: bool | None) -> bool:
    """Whether a report on these files is markdown: as asked, else by the ending of ``path``. Raises `OutputError` for a
    place that is none, or is one of the documents, and for an ending that says something else."""
    if path is None:
        return bool(asked)
    check_place(path)
    if path.resolve() in (document.resolve() for document in documents):
        raise OutputError(f"{path}: is a document that the report is made of.", hint="Give another file name.")
    ending = path.suffix.lower()
    found = ending in MARKDOWN if asked is None else asked
    if ending in HTML if found else ending not in HTML:
        raise OutputError(
            f"{path}: {'markdown' if found else 'an HTML page'} was asked for, and the name ends in "
            f"{ending or 'nothing'}.",
            hint="Give a file that ends in .html, or in .md for markdown.",
        )
    return found


def refuse_other_report(path: Path, made: str) -> None:
    """Raise `OutputError` if ``path`` is a file, and no older page about the same checkpoints. Markdown, which is
    written to be edited, must be the same."""
    if not path.is_file():
        return
    with disk_errors(path), path.open(encoding="utf-8", errors="backslashreplace", newline="") as file:
        old = file.read(len(made) + 1)
    if old != made and (_about(old) is None or _about(old) != _about(made)):
        raise OutputError(
            f"{path}: exists already, and is no report on the same checkpoints.",
            hint="Choose another -o, or replace it with --force.",
        )


def _about(page: str) -> str | None:
    """The checkpoints that an HTML page is about, None for other text."""
    found = _ABOUT.search(page[:_HEAD]) if page.startswith("<!doctype html>") else None
    return None if found is None else found[1]
