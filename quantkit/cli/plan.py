"""``quantkit plan``: exact sizes, needs and fit of a conversion, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from quantkit.cli.options import AsJson, Context, GpuOption, RecipeName, Source
from quantkit.cli.outcome import refusals
from quantkit.cli.render import both_units, short_size, show_json, table
from quantkit.pipeline.headers import SourceHeaders, read_headers
from quantkit.pipeline.memory import Needs, conversion_needs
from quantkit.pipeline.plan import OutputPlan, Plan, RoleSize, make_plan
from quantkit.pipeline.recipe import Recipe
from quantkit.pipeline.recipe_file import load_recipe
from quantkit.pipeline.serving import UTILIZATIONS, Fit, Gpus, fit


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
    needs = conversion_needs(made, headers.arch)
    fits = None
    if gpus is not None:
        fits = [fit(output, headers.config, headers.arch.n_layers, gpus, context) for output in made.outputs]
    if as_json:
        show_json(_document(headers, name, made, needs, fits))
        return
    for text in _paragraphs(headers, made, needs, fits):
        typer.echo(text)


def _paragraphs(headers: SourceHeaders, made: Plan, needs: Needs, fits: list[Fit] | None) -> list[str]:
    origin = "" if headers.has_shards else "  (no shards here: derived from config.json)"
    blocks = [f"source  {headers.directory}: {len(headers.infos):,} tensors, {both_units(made.source_bytes)}{origin}"]
    for number, output in enumerate(made.outputs):
        blocks.append(f"\noutput  {output.output.name}: {output.output.format}\n\n{_size_table(output)}")
        if fits is not None:
            blocks.append("\n" + _fit_text(fits[number], output.output.name))
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


def _fit_text(found: Fit, name: str) -> str:
    lines = [f"on {found.gpus}:"]
    lines += [f"  not {refused}" for refused in found.refused]
    layout = found.layout
    if layout is None:
        return "\n".join([*lines, "  does not fit: no way to spread the model over these GPUs."])
    kv_bytes = layout.kv_bytes_per_token * layout.context
    stages = "/".join(f"{weights / 2**30:.1f}" for weights in layout.stage_weights)
    lines.append(
        f"  TP={layout.tensor_parallel} PP={len(layout.partition)}: weights {stages} GiB a GPU, "
        f"runtime {layout.runtime_bytes / 2**30:.1f} GiB, KV cache {kv_bytes / 2**30:.2f} GiB "
        f"for {layout.context:,} tokens; a GPU has {found.gpus.total_bytes / 2**30:.1f} GiB"
    )
    if found.utilization is None:
        needed, usable = layout.needed_bytes / 2**30, max(UTILIZATIONS) * found.gpus.total_bytes / 2**30
        return "\n".join([*lines, f"  does not fit: {needed:.1f} GiB needed, {usable:.1f} GiB usable."])
    lines.append(
        f"  fits, with room for {found.spare_kv_tokens:,} more tokens of KV cache. Estimated, not run. Serve with"
    )
    lines.append(f"  {found.command('OUT')}")
    return "\n".join(lines)


def _document(
    headers: SourceHeaders, name: str, made: Plan, needs: Needs, fits: list[Fit] | None
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
        "fit": None
        if fits is None
        else [_fit_document(found, made.outputs[i].output.name) for i, found in enumerate(fits)],
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


def _fit_document(found: Fit, name: str) -> Mapping[str, object]:
    layout = found.layout
    document: dict[str, object] = {
        "gpus": str(found.gpus),
        "fits": found.utilization is not None,
        "refused": list(found.refused),
    }
    if layout is not None:
        document |= {
            "tensor_parallel": layout.tensor_parallel,
            "layer_partition": list(layout.partition),
            "weights_bytes": list(layout.stage_weights),
            "needed_bytes": layout.needed_bytes,
            "context": layout.context,
        }
    if found.utilization is not None:
        document |= {
            "utilization": found.utilization,
            "spare_kv_tokens": found.spare_kv_tokens,
            "command": found.command("OUT"),
        }
    return document
