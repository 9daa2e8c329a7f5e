"""Sections of docs/results.md about damaged files, failing disks and kills, and files of other packages."""

from __future__ import annotations

from results_markdown import UNKNOWN, Document, facts, number, run_facts, table, versions


def fuzz(data: Document) -> str:
    """Damaged files for each reader."""
    rows = [
        [
            name,
            number(reader.get("cases"), 0),
            number(reader.get("read"), 0),
            number(reader.get("refused"), 0),
            number(len(reader["problems"]), 0),
            number(reader.get("slowest_cpu_seconds"), 2),
            UNKNOWN if "extra_bytes" not in reader else number(reader["extra_bytes"] / 1e6, 0),
            number(reader.get("seconds"), 0),
        ]
        for name, reader in data["readers"].items()
    ]
    head = ("reader", "cases", "read", "refused", "problems", "slowest, CPU s", "most memory beside, MB", "s")
    allowed = data["allowed"]
    rule = (
        "A problem is anything but an answer or a refusal in one printable message, within "
        f"{allowed['cpu_seconds']:.0f} s of CPU time and {allowed['extra_bytes'] / 1e6:.0f} MB."
    )
    return "\n".join([run_facts(data), table(head, rows), rule])


def faults(data: Document) -> str:
    """Calls that fail, kills, and damage after a kill."""
    rows = [
        [name, state, "", "", ""]
        if isinstance(state, str)
        else [
            name,
            number(state["cases"], 0),
            str(state.get("every", "")),
            str(state.get("kills", "")),
            str(len(state["problems"])),
        ]
        for name, state in data["kinds"].items()
    ]
    told = run_facts(data, calls=f"{data['calls']:,} that write")
    return "\n".join([told, table(("fault", "cases", "at every n-th call", "kills", "problems"), rows)])


def remote_faults(data: Document) -> str:
    """Conversions from a server that does not behave."""
    rows = [[name, number(count, 0)] for name, count in data["counts"].items()]
    told = run_facts(data, runs=f"{data['runs']}, {data['identical']} with the files of the folder's conversion")
    return "\n".join([told, table(("what", "how often"), rows)])


def verify_peers(data: Document) -> str:
    """What `verify` says of checkpoints that other packages wrote."""
    rows = [
        [row["name"], row.get("stored_as", UNKNOWN), number(row.get("compared"), 0), _findings(row)]
        for row in data["rows"]
    ]
    head = ("package, its scheme or format", "stored as", "linears compared with the original", "findings")
    return "\n".join([facts(what=data["what"], date=data["date"], versions=versions(data)), table(head, rows)])


def _findings(row: Document) -> str:
    faults = [f"fault: {text}" for text in row.get("faults", [row.get("error")])]
    notes = [f"note: {text}" for text in row.get("notes", [])]
    return "<br>".join([*faults, *notes]).replace("|", "\\|") or "none"
