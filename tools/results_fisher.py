"""Sections of docs/results.md about what a Fisher pass gives: its own cost, and GPTQ with output Hessians."""

from __future__ import annotations

from results_markdown import Document, code, number, table
from results_quality import run_facts


def fisher_layer(data: Document) -> str:
    """One layer of DeepSeek V3 in a Fisher pass."""
    steps = ("forward", "backward", "moments of output gradients")
    rows = [
        [step, number(data[step]["seconds"], 3), number(data[step]["peak GiB of GPU memory, weights included"], 1)]
        for step in steps
        if step in data
    ]
    told = run_facts(
        data,
        what="a MoE layer of DeepSeek V3's true shapes with random weights: 256 experts, weights and states on the GPU",
        recipe="one backward pass; moments: of attention by head, of gate and up of all experts",
        command=code("python benchmarks/fisher_layer.py --moments"),
        text=f"{data['tokens']:,} tokens",
    )
    return f"{told}\n{table(('step', 'seconds', 'peak of GPU memory, GiB'), rows)}"


def output_aware_tiny(data: Document) -> str:
    """KLD of trained models with and without output Hessians."""
    rows = [
        [
            row["model"],
            row["scheme"],
            f"{row['kld, plain']:.4f}",
            f"{row['kld, output-aware']:.4f}",
            f"{100 * row['change']:+.1f} ± {100 * row['change_se']:.1f} %",
            number(row["layers_s, plain"]),
            number(row["layers_s, output-aware"]),
        ]
        for row in data["rows"]
    ]
    head = ("model", "every linear", "KLD, gptq", "KLD, output_aware", "change, paired", "layers, s", "output_aware, s")
    first = data["rows"][0]
    told = run_facts(
        data,
        what="KL divergence from the BF16 weights, trained models of 25 and 23 million weights",
        recipe="GPTQ on every linear, with and without output_aware: true",
        command=code("python benchmarks/output_aware_tiny.py MODEL int3-g128 int4-g128 --fisher-tokens 131072"),
        calibration=f"{first['tokens']:,} tokens; Fisher pass {first['fisher tokens']:,} of the same text",
        windows="88 held-out windows of 512 tokens, nats per token",
    )
    return f"{told}\n{table(head, rows)}\nOther jobs ran on the same GPU: the seconds are no measure of speed.\n"


def two_sided(data: Document) -> str:
    """Seconds of choosing codes with feedback between rows."""
    rows = [
        [
            row["scheme"],
            row["what"],
            " x ".join(map(str, row["shape"])),
            " / ".join(map(str, row["experts at once"])),
            number(row["plain s, 256 experts"], 2),
            number(row["output-aware s, 256 experts"], 2),
            number(row["times"], 2),
            number(row["loss, output-aware over plain"], 3),
        ]
        for row in data["rows"]
    ]
    head = ("scheme", "linears", "shape", "experts at once", "plain, s", "output-aware, s", "times", "loss left")
    told = run_facts(
        data,
        what="codes of 256 experts of DeepSeek V3's shapes, factors included; loss: tr(H_O E H E^T) of random "
        "correlated gradients",
        recipe="GPTQ, rows in 16 steps; experts at once without and with output Hessians",
        command=code("python benchmarks/two_sided.py --store"),
    )
    return f"{told}\n{table(head, rows)}"
