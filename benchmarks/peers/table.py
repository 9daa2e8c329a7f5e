"""benchmarks/results/peers_tiny.json -> the table, as Markdown: one row a peer and setting, best first in each scheme.

    python benchmarks/peers/table.py                       # everything
    python benchmarks/peers/table.py --best                # the best setting of each peer
    python benchmarks/peers/table.py --against quantkit    # adds the paired difference to that row of the scheme

The settings were compared on the evaluation windows themselves, so the best of several is a little flattered; all of
them are listed. Standard errors are over the 88 windows; the paired ones over the differences of the same windows.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "peers_tiny.json"
TITLES = {
    "int4": "everything int4, groups of 128, symmetric",
    "int3": "everything int3, groups of 128, symmetric",
    "mixed": "routed experts int4, the other projections int8, groups of 128, symmetric",
}
HEAD = ["peer", "settings", "bpw", "KLD ± SE", "median", "ppl", "top-1 %", "wall s", "CPU s"]

Row = dict[str, Any]


def paired(row: Row, other: Row) -> str:
    """Mean difference of the KLD to another row with its standard error over the windows."""
    differences = [a - b for a, b in zip(row["kld_windows"], other["kld_windows"], strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return f"{mean:+.5f} ± {math.sqrt(variance / len(differences)):.5f}"


def cells(row: Row) -> list[str]:
    seconds = [f"{row[key]:.0f}" if row.get(key) is not None else "" for key in ("seconds", "cpu_seconds")]
    kld = f"{row['kld']:.5f} ± {row['kld_se']:.5f}"
    numbers = [f"{row['bpw']:.3f}", kld, f"{row['kld_median']:.4f}", f"{row['ppl']:.3f}", f"{row['top1']:.2f}"]
    return [row["name"], row.get("settings", ""), *numbers, *seconds]


def best_of_each(rows: list[Row]) -> list[Row]:
    names = dict.fromkeys(row["name"] for row in rows)
    return [next(row for row in rows if row["name"] == name) for name in names]


def print_scheme(scheme: str, rows: list[Row], best: bool, against: str | None) -> None:
    rows = sorted((row for row in rows if row["scheme"] == scheme), key=lambda row: row["kld"])
    other = next((row for row in rows if row["name"] == against), None)
    rows = best_of_each(rows) if best else rows
    if not rows:
        return
    head = HEAD + ([f"KLD less {against}'s"] if other else [])
    print(f"### {TITLES.get(scheme, scheme)} (reference ppl {rows[0]['ppl_reference']:.3f})\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(cells(row) + ([paired(row, other)] if other else [])) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--best", action="store_true", help="one row for each peer")
    parser.add_argument("--against", metavar="NAME", help="paired differences to this peer's best row")
    args = parser.parse_args()
    document = json.loads(RESULTS.read_text())
    rows: list[Row] = document["rows"]
    print(f"{document['what']}\n")
    for scheme in dict.fromkeys([*TITLES, *(row["scheme"] for row in rows)]):
        print_scheme(scheme, rows, args.best, args.against)
    notes = {
        f"{row['name']}: {row['run']['device']}, {row['run']['cpus']} CPUs, "
        + ", ".join(f"{name} {number}" for name, number in row["run"]["versions"].items())
        for row in rows
        if "run" in row
    }
    print("\n".join(sorted(notes)))


if __name__ == "__main__":
    main()
