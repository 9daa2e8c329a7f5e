"""The documents that --json prints."""

from __future__ import annotations

import codecs
import json
import sys

import typer

from quantkit.documents.json_text import finite


def show_json(document: object) -> None:
    """One JSON document on stdout. Numbers that JSON cannot say (infinity, NaN) become null; where stdout is not UTF-8,
    all but ASCII is escaped as JSON does it; there is none if the shell closed it."""
    is_utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name == "utf-8"
    typer.echo(json.dumps(finite(document), indent=2, ensure_ascii=not is_utf8, allow_nan=False))
