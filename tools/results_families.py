"""Sections of docs/results.md about models of other families and about few bits."""

from __future__ import annotations

from collections.abc import Sequence

from results_markdown import UNKNOWN, Document, code, device, estimate, facts, number, run_facts, table, versions
from results_quality import paired

SCHEMES = {
    "int4": "Everything int4, groups of 128, symmetric (64 where 128 does not divide the inputs)",
    "Q4_K_M": "GGUF, Q4_K_M; embeddings and head F32",
    "IQ4_XS": "GGUF, IQ4_XS; embeddings and head F32",
}


def peers_families(data: Document) -> str:
    """Trained models of other families beside other tools."""
    rows: Sequence[Document] = data["rows"]
    parts = [
        "The models of the section before, by the protocol of the tiny model: its text and windows, tokenised by\n"
        "their own tokenizer; transformers evaluates all rows. Bits per weight are those of the projections, scales\n"
        "included. Against quantkit's: the mean difference by windows. A tool's setting is the best of its own on the\n"
        "tiny model. Seconds are of a machine with much other work: they compare nothing.\n",
        facts(
            what=data.get("what"),
            recipe="scheme of each table; method and options under settings",
            command=code(data.get("command")),
            evaluated="; ".join(_machines(rows, "evaluation")),
            quantised="; ".join(_machines(rows, "run")),
        ),
    ]
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        own = [row for row in rows if (row["model"], row["scheme"]) == (model, scheme)]
        parts.append(f"### {model}: {SCHEMES.get(scheme, scheme)}\n\n{_families_table(own)}")
    return "\n".join(parts)


def _machines(rows: Sequence[Document], key: str) -> list[str]:
    """Date, device and packages, each combination once."""
    found: dict[str, None] = {}
    for row in rows:
        told = {name: value for name, value in row.get(key, {}).items() if name != "load_average"}
        if told:
            found[", ".join(filter(None, (told.get("date", UNKNOWN), device(told), versions(told))))] = None
    return list(found)


def _families_table(rows: Sequence[Document]) -> str:
    ran = sorted((row for row in rows if "error" not in row), key=lambda row: row["kld"])
    other = next((row for row in ran if row["name"] == "quantkit"), None)
    head = ["tool", "settings", "bpw", "mean KLD, nats", "against quantkit's", "perplexity", "same top token", "s"]
    cells = [
        [
            f"**{row['name']}**" if row is other else row["name"],
            row.get("settings", UNKNOWN),
            f"{row['bpw']:.3f}",
            estimate(row["kld"], row.get("kld_se"), 5),
            "" if other is None or row is other else paired(row, other),
            f"{row['ppl']:.3f}",
            f"{row['top1']:.2f} %",
            number(row.get("seconds"), 0),
        ]
        for row in ran
    ]
    cells += [[row["name"], f"did not run: {row['error']}", *[""] * 6] for row in rows if "error" in row]
    references = sorted({f"{row['ppl_reference']:.3f}" for row in ran})
    return table(head, cells) + f"\nPerplexity of the original: {', '.join(references) or UNKNOWN}.\n"


def two_bits(data: Document) -> str:
    """Experts in two bits."""
    rows = [
        [
            case,
            f"{found['bytes_of_v3'] / 1e9:.2f} GB",
            number(found["bpw_of_v3"], 3),
            estimate(found["mean_kl"]["mean"], found["mean_kl"]["standard_error"], 4),
            f"{100 * (found['perplexity_ratio']['mean'] - 1):+.1f} %",
            f"{100 * found['top1']:.1f} %",
        ]
        for case, found in data["cases"].items()
    ]
    head = ("routed experts", "DeepSeek V3", "bits per weight of V3", "mean KLD, nats", "perplexity", "same top token")
    told = run_facts(
        {**data, "device": f"{data['device']}, {data['device_used']}"} if "device_used" in data else data,
        what=data["what"],
        recipe="GPTQ; everything else that is a matrix int8 in groups of 128, beside Q2_K Q8_0",
        command=code(data["command"]),
        calibration=f"{data['tokens']:,} tokens",
        windows=str(next(iter(data["cases"].values()))["windows"]),
    )
    return f"{told}\n\n{table(head, rows)}"
