"""``quantkit inspect``: what a folder of safetensors holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.options import AsJson
from quantkit.cli.outcome import refusals
from quantkit.cli.render import both_units, show_json, table
from quantkit.pipeline.inspection import Inspection, inspect_folder


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Folder with safetensors: a source checkpoint or an output of quantkit."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show tensors, storage, bits per weight, and what is unusual. Reads headers only."""
    with refusals():
        found = inspect_folder(path)
    if as_json:
        show_json(_document(found))
        return
    typer.echo(f"{found.directory}: {found.family or 'unknown architecture'}, {found.quantization or 'not quantised'}")
    size = f"{both_units(found.nbytes)}, {found.bpw:.3f} bpw"
    typer.echo(f"{found.stored_tensors:,} tensors in {found.shards:,} shards, {size}\n")
    typer.echo(_table(found))
    typer.echo("\nnothing unusual" if not found.unusual else "")
    for line in found.unusual:
        typer.echo(f"unusual: {line}")


def _table(found: Inspection) -> str:
    rows = [
        (h.role, h.what, f"{h.weights:,}", f"{h.parameters:,}", f"{h.nbytes:,}", f"{h.bpw:.3f}") for h in found.holdings
    ]
    weights = sum(holding.weights for holding in found.holdings)
    rows.append(("total", "", f"{weights:,}", f"{found.parameters:,}", f"{found.nbytes:,}", f"{found.bpw:.3f}"))
    return table(("role", "stored as", "weights", "parameters", "bytes", "bpw"), rows, left=2, rule_before_last=True)


def _document(found: Inspection) -> Mapping[str, object]:
    return {
        "path": str(found.directory),
        "family": found.family,
        "quantization": found.quantization,
        "shards": found.shards,
        "stored_tensors": found.stored_tensors,
        "parameters": found.parameters,
        "nbytes": found.nbytes,
        "bpw": round(found.bpw, 5),
        "holdings": [
            {
                "role": holding.role,
                "stored_as": holding.what,
                "weights": holding.weights,
                "parameters": holding.parameters,
                "nbytes": holding.nbytes,
                "bpw": round(holding.bpw, 5),
            }
            for holding in found.holdings
        ],
        "unusual": list(found.unusual),
    }
