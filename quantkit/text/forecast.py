"""A forecast as text for people and as a document for --json."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.plan.forecast import Forecast
from quantkit.plan.memory import Needs
from quantkit.plan.plan import OutputPlan, RoleSize
from quantkit.text.fits import fit_document, fit_text
from quantkit.text.tables import both_units, short_size, table


def forecast_text(found: Forecast) -> str:
    """Tables of sizes by role, then needs, term by term, and notes."""
    headers, made, fits = found.source, found.plan, found.fits
    origin = "" if headers.has_shards else "  (no shards here: derived from config.json)"
    blocks = [f"source  {headers.directory}: {len(headers.infos):,} tensors, {both_units(made.source_bytes)}{origin}"]
    for number, output in enumerate(made.outputs):
        blocks.append(f"\noutput  {output.output.name}: {output.output.format}\n\n{_size_table(output)}")
        if fits is not None:
            blocks.append("\n" + fit_text(fits[number]))
    blocks.append("\n" + _needs_text(found.needs))
    if made.warnings:
        blocks.append("\n" + "\n".join(f"note: {warning}" for warning in made.warnings))
    return "\n".join(blocks)


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


def forecast_document(found: Forecast, recipe: str) -> Mapping[str, object]:
    """For --json. Sizes in bytes; ``recipe``: its name, as given."""
    headers, made, needs = found.source, found.plan, found.needs
    return {
        "source": {
            "path": str(headers.directory),
            "has_shards": headers.has_shards,
            "tensors": len(headers.infos),
            "nbytes": made.source_bytes,
        },
        "recipe": recipe,
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
        "fit": None if found.fits is None else [fit_document(each) for each in found.fits],
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
