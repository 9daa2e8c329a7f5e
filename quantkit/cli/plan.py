"""``quantkit plan``: exact sizes, needs and fit of a conversion, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from quantkit.cli.fits import AnyFit, fit_document, fit_text, fits_of
from quantkit.cli.options import AsJson, Context, GpuOption, RecipeName, Source
from quantkit.cli.outcome import refusals
from quantkit.cli.render import both_units, short_size, show_json, table
from quantkit.pipeline.headers import SourceHeaders, read_headers
from quantkit.pipeline.importance import ImportanceFile
from quantkit.pipeline.memory import Needs, conversion_needs
from quantkit.pipeline.plan import OutputPlan, Plan, RoleSize, make_plan
from quantkit.pipeline.recipe import Recipe
from quantkit.pipeline.recipe_file import load_recipe, recipe_path
from quantkit.pipeline.serving import Gpus


def plan(
    source: Source, recipe: RecipeName, gpus: GpuOption = None, context: Context = 32768, as_json: AsJson = False
) -> None:
    """Say what a conversion would give and need: bytes, bits per weight, memory, disk. Reads no weights.

    SOURCE may hold only a config.json: then the official release of that config is planned.
    """
    with refusals():
        show_plan(source, load_recipe(recipe), recipe, gpus, context, as_json)


def show_plan(source: Path, recipe: Recipe, name: str, gpus: Gpus | None, context: int, as_json: bool) -> None:
    """Make the plan and print it; what `plan` and `convert --dry-run` have in common."""
    headers = read_headers(source)
    made = make_plan(recipe, headers.arch, headers.infos, headers.is_float8, headers.block_size)
    if headers.has_shards or (headers.directory / "tokenizer.json").exists():
        for output in made.outputs:
            output.target.check_source(headers.directory)
    if recipe.imatrix is not None:
        ImportanceFile.open(recipe_path(name).parent / recipe.imatrix, headers.arch).close()
    needs = conversion_needs(made, headers.arch)
    fits = None
    if gpus is not None:
        fits = fits_of(headers, made, gpus, context)
    if as_json:
        show_json(_document(headers, name, made, needs, fits))
        return
    for text in _paragraphs(headers, made, needs, fits):
        typer.echo(text)


def _paragraphs(headers: SourceHeaders, made: Plan, needs: Needs, fits: list[AnyFit] | None) -> list[str]:
    origin = "" if headers.has_shards else "  (no shards here: derived from config.json)"
    blocks = [f"source  {headers.directory}: {len(headers.infos):,} tensors, {both_units(made.source_bytes)}{origin}"]
    for number, output in enumerate(made.outputs):
        blocks.append(f"\noutput  {output.output.name}: {output.output.format}\n\n{_size_table(output)}")
        if fits is not None:
            blocks.append("\n" + fit_text(fits[number]))
    blocks.append("\n" + _needs_text(needs))
    if made.warnings:
        blocks.append("\n" + "\n".join(f"note: {warning}" for warning in made.warnings))
    return blocks


def _size_table(output: OutputPlan) -> str:
    head = ("role", "stored as", "tensors", "parameters", "bytes", "bpw", "GB", "GiB")
    rows = [_size_row(size.role.value, size.what, size) for size in output.sizes]
    total = (f"{output.tensors:,}", f"{output.parameters:,}", f"{output.nbytes:,}", f"{output.bpw:.3f}")
    rows.append(("total", "", *total, f"{output.nbytes / 1e9:.2f}", f"{output.nbytes / 2**30:.2f}"))
    return table(head, rows, left=2, rule_before_last=True)


def _size_row(role: str, what: str, size: RoleSize) -> tuple[str, ...]:
    bytes_of = (f"{size.nbytes:,}", f"{size.bpw:.3f}", f"{size.nbytes / 1e9:.2f}", f"{size.nbytes / 2**30:.2f}")
    return (role, what, f"{size.tensors:,}", f"{size.parameters:,}", *bytes_of)


def _needs_text(needs: Needs) -> str:
    lines = [f"needs   RAM {short_size(needs.working_bytes)}" + _with_hidden(needs)]
    lines += [f"          {term.what}: {short_size(term.nbytes)} = {term.formula}" for term in needs.working]
    lines.append(f"        disk {short_size(needs.disk_bytes)}")
    lines += [f"          {term.what}: {short_size(term.nbytes)} = {term.formula}" for term in needs.disk]
    return "\n".join(lines)


def _with_hidden(needs: Needs) -> str:
    if needs.hidden_states is None:
        return ""
    return (
        f", or {short_size(needs.ram_bytes)} with the hidden states in RAM instead of on disk (--memory-budget decides)"
    )


def _document(
    headers: SourceHeaders, name: str, made: Plan, needs: Needs, fits: list[AnyFit] | None
) -> Mapping[str, object]:
    return {
        "source": {
            "path": str(headers.directory),
            "has_shards": headers.has_shards,
            "tensors": len(headers.infos),
            "nbytes": made.source_bytes,
        },
        "recipe": name,
        "outputs": [_output_document(output) for output in made.outputs],
        "needs": {
            "ram_bytes": needs.working_bytes,
            "ram_bytes_with_hidden_states": needs.ram_bytes,
            "disk_bytes": needs.disk_bytes,
            "terms": [
                {"where": where, "what": term.what, "nbytes": term.nbytes, "formula": term.formula}
                for where, terms in (("ram", needs.working), ("disk", needs.disk))
                for term in terms
            ],
        },
        "fit": None if fits is None else [fit_document(found) for found in fits],
        "warnings": list(made.warnings),
    }


def _output_document(output: OutputPlan) -> Mapping[str, object]:
    return {
        "name": output.output.name,
        "format": output.output.format,
        "tensors": output.tensors,
        "parameters": output.parameters,
        "nbytes": output.nbytes,
        "gb": round(output.nbytes / 1e9, 3),
        "gib": round(output.nbytes / 2**30, 3),
        "bpw": round(output.bpw, 5),
        "roles": [
            {
                "role": size.role.value,
                "stored_as": size.what,
                "tensors": size.tensors,
                "parameters": size.parameters,
                "nbytes": size.nbytes,
                "bpw": round(size.bpw, 5),
            }
            for size in output.sizes
        ],
    }
