"""The documents that --json prints."""

from __future__ import annotations

import json

import typer

from quantkit.documents.json_text import finite


def show_json(document: object) -> None:
    """One JSON document on stdout. Numbers that JSON cannot say (infinity, NaN) become null."""
    typer.echo(json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False))
