"""``quantkit inspect``: what a folder of safetensors, a GGUF model or an imatrix file holds."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import api as commands
from quantkit.cli.exit_codes import refusals
from quantkit.cli.options import AsJson, Cache, CacheDir
from quantkit.cli.render import show_json
from quantkit.text.inspection import inspection_document, inspection_text


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Folder with safetensors (a source checkpoint or an output of quantkit), or its address as for "
            "`convert`, or a folder with a GGUF model; a .gguf file, any one of a split set; an imatrix file; a folder "
            "of `quantkit sensitivity`.",
        ),
    ],
    cache: Cache = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Show tensors, storage, bits per weight, and what is unusual. Reads headers only (an imatrix file as a whole)."""
    with refusals():
        found = commands.inspect(path, cache=cache, cache_dir=cache_dir)
    if as_json:
        show_json(inspection_document(found))
    else:
        typer.echo(inspection_text(found))
