"""Pieces of docs/results.md: tables, facts, numbers. What a file does not say is `UNKNOWN`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNKNOWN = "not recorded"

Document = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; columns of numbers to the right."""
    rows = list(rows)
    rule = ["---:" if column and _numbers([row[column] for row in rows]) else "---" for column in range(len(head))]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _numbers(cells: Sequence[str]) -> bool:
    return all(re.match(r"[*+-]*\d", cell) for cell in cells if cell not in ("", UNKNOWN))


def facts(**values: object) -> str:
    """What a reader needs to repeat a measurement, one line each."""
    return "\n".join(f"- {name.replace('_', ' ')}: {value or UNKNOWN}" for name, value in values.items()) + "\n"


def code(text: object) -> str:
    """A command; "" for none."""
    return f"`{text}`" if text else ""


def versions(data: Document) -> str:
    """The packages that a file names with their versions."""
    names = ("quantkit", "vllm", "libggml", "torch", "triton", "cuda", "transformers", "numba", "python")
    held = {**data.get("versions", {}), **{name: data[name] for name in names if name in data}}
    return ", ".join(f"{name} {version}" for name, version in held.items())


def device(data: Document) -> str:
    """Processor or GPU, and what else a file says of the machine."""
    parts = [str(data["device"])] if "device" in data else []
    parts += [f"{data['cpus']} CPUs"] if "cpus" in data else []
    parts += [f"{data['memory_bytes'] / 2**30:.0f} GiB"] if "memory_bytes" in data else []
    parts += [f"load average {data['load_average']}"] if "load_average" in data else []
    return ", ".join(parts)


def yaml_block(recipe: object) -> str:
    """A recipe that a file holds as text."""
    return f"\nThe recipe:\n\n```\n{str(recipe).rstrip()}\n```\n" if recipe else ""


def estimate(mean: float, error: float | None, digits: int) -> str:
    """ "0.0301 ± 0.0013"."""
    return f"{mean:.{digits}f} ± {UNKNOWN if error is None else f'{error:.{digits}f}'}"


def gigabytes(nbytes: float | None) -> str:
    """ "6.54 GB"."""
    return UNKNOWN if nbytes is None else f"{nbytes / 1e9:.2f} GB"


def number(value: float | None, digits: int = 1) -> str:
    """With thousands separated."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def run_facts(data: Document, **more: object) -> str:
    """Of a file that is one run. ``more`` goes behind, except recipe and command."""
    return facts(
        what=more.pop("what", data.get("what")),
        recipe=more.pop("recipe", ""),
        command=more.pop("command", code(data.get("command"))),
        device=device(data),
        date=data.get("date"),
        versions=versions(data),
        **{name: value for name, value in more.items() if value},
    )


def spread(values: Mapping[str, float], digits: int) -> str:
    """ "0.78 to 0.83": over kinds of weights."""
    if not values:
        return UNKNOWN
    return f"{min(values.values()):.{digits}f} to {max(values.values()):.{digits}f}"
