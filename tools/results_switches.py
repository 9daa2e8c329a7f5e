"""Sections of docs/results.md about switches that are off by default, with types as given and with chosen ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from results_markdown import Document, estimate, facts, table
from results_targets import CASES


def switches(data: Document) -> str:
    """Every linear in one scheme: each set of switches against gptq with defaults."""
    rows = [[row["model"], row["scheme"], *_measured(row), f"{row['layers_s']:.0f}"] for row in data["rows"]]
    told = facts(
        what="KL divergence from the BF16 weights, trained models; changes are paired over windows, against gptq",
        recipe="every linear in one scheme; router: router: least_squares; all: that, row_gains and output_aware",
        command="`python benchmarks/switches.py --model DIR --text DIR --fisher DIR SCHEME ... --store FILE`",
    )
    return f"{told}\n{table(('model', 'every linear', *MEASURED, 'layers, s'), rows)}\n{SHARED}"


def target_switches(data: Document) -> str:
    """Types chosen for a size, then converted with each set of switches."""
    rows = [
        [
            row["model"],
            CASES[row["case"]],
            f"{row['file_bytes']:,}",
            *_measured(row),
            f"{row['kld'] / row['expected']:.2f}",
        ]
        for row in data["rows"]
    ]
    told = facts(
        what="KL divergence from the BF16 weights; changes are paired over windows, against no switches",
        recipe="target: {size: ...} of the case's bytes; the same types for every set of switches",
        command="`python benchmarks/target.py --model DIR --text DIR --fisher DIR --switches none ... --store FILE`",
    )
    return f"{told}\n{table(('model', 'size', 'bytes of the files', *MEASURED, 'KLD / expected'), rows)}\n{SHARED}"


MEASURED = ("switches", "tokens", "windows", "KLD", "change", "device", "date")
SHARED = "Other jobs ran on the same machine: seconds are no measure of speed.\n"


def _measured(row: Mapping[str, Any]) -> list[str]:
    change = f"{100 * row['change']:+.1f} ± {100 * row['change_se']:.1f} %" if "change" in row else ""
    kld = estimate(row["kld"], row["kld_se"], 4)
    return [
        row["switches"],
        f"{row['tokens']:,}",
        str(len(row["kld_windows"])),
        kld,
        change,
        row["device"],
        row["date"],
    ]
