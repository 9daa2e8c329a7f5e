"""Section of docs/results.md about pruned experts."""

from __future__ import annotations

from results_markdown import Document, code, estimate, number, run_facts, table


def prune_tiny(data: Document) -> str:
    """Fewer experts beside fewer bits."""
    rows = [
        [
            row["name"],
            number(row["bytes of experts"] / 1e6, 2),
            estimate(row["kld, all"], row["kld_se, all"], 4),
            estimate(row["kld, python.txt"], row["kld_se, python.txt"], 4),
            row.get("beside", "-"),
            estimate(row["more, all"], row["more_se, all"], 4) if "beside" in row else "-",
        ]
        for row in data["rows"]
    ]
    head = ("plan", "experts, MB", "KLD", "KLD, Python alone", "beside", "KLD more, paired")
    told = run_facts(
        data,
        what=f"KL divergence of {data['model']} from the BF16 weights, experts pruned by REAP beside fewer bits",
        recipe="GPTQ in groups of 128, everything but the experts int4",
        command=code("python benchmarks/prune_tiny.py MODEL --store"),
        calibration=f"{data['rows'][0]['tokens']:,} tokens, which score the experts too",
        windows=f"{data['windows']['all']} held-out windows of 512 tokens, {data['windows']['python.txt']} of Python",
    )
    return f"{told}\n{table(head, rows)}"
