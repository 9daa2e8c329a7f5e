"""Sections of docs/results.md about tuning of whole layers."""

from __future__ import annotations

import json

from results_markdown import Document, code, estimate, number, run_facts, table


def tuning_tiny(data: Document) -> str:
    """What tuning gains on trained models, after GPTQ and after two-sided rounding."""
    rows = [
        [
            row["model"],
            row["row"],
            "-" if row["tune"] is None else code(json.dumps(row["tune"])) if row["tune"] else "defaults of that day",
            "two-sided" if row["two-sided"] else "GPTQ",
            "yes" if row["metric"] else "-",
            estimate(row["kld"], row["kld_se"], 4),
            f"{100 * row['change']:+.1f} ± {100 * row['change_se']:.1f} %" if row["change_se"] else "-",
            number(row["layers_s"], 0),
        ]
        for row in data["rows"]
    ]
    head = ("model", "types", "tune", "before it", "metric", "KLD", "paired change", "layers, s")
    told = run_facts(
        data,
        what="KL divergence of trained models from the BF16 weights; int3, int4: everything in groups of 128; mixed: "
        "experts int4, the rest int8",
        recipe="8 epochs; the defaults of that day were alpha 1 and the sign of the gradient",
        command=code("python benchmarks/tuning_tiny.py --model DIR --text DIR --aware --metric --tune ..."),
        calibration=f"{data['rows'][0]['tokens']:,} tokens; Fisher pass of the same text, {data['fisher_tokens']:,}",
        windows="88 held-out windows of 512 tokens",
    )
    return (
        f"{told}\n{table(head, rows)}\nThe norms of attention's input stayed in these runs: on a GPU their gradient "
        "was lost, which has been mended since. Up to twelve jobs shared the GPU: seconds are no measure of speed.\n"
    )


def tuning_layer(data: Document) -> str:
    """Seconds of tuning one MoE layer of DeepSeek V3."""
    rows = [
        [
            f"{row['tokens']:,}",
            number(row["epochs"], 0),
            number(row["experts"], 0),
            number(row["updates"], 0),
            number(row["update_s"], 3),
            number(row["seconds"], 2),
            number(row["peak_gb"], 1),
        ]
        for row in data["rows"]
    ]
    head = ("tokens", "epochs", "experts", "updates", "seconds of an update", "seconds in all", "peak, GB")
    told = run_facts(
        data,
        what="one MoE layer of DeepSeek V3, all linears int4 g128, tuned as `quantkit convert` does",
        recipe="4,096 tokens an update, sign of the gradient",
        command=code("python benchmarks/tuning_layer.py --epochs 1 --tokens 32768"),
    )
    last = data["rows"][-1]
    whole = 8 * ((131_072 * 9 // 10) // 4096)
    return (
        f"{told}\n{table(head, rows)}\nThe first pass compiles. 8 epochs of 131,072 tokens are {whole} such updates: "
        f"{whole * last['update_s']:.0f} seconds and nine held-out passes, by arithmetic; the whole has not been run.\n"
    )
