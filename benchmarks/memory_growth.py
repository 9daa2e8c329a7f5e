"""Does the memory of `convert` grow with the model? Checkpoints of 4, 8 and 16 equal layers, one process each.

    python benchmarks/memory_growth.py [--folder DIR] [--layers 4 8 16] [--budget 1GiB] [--jobs N]

Every layer is an MoE layer of DeepSeek V3's shape at a seventh of its width, random, BF16: 74 MB, so that a layer that
stays in memory shows. Claims: peak RSS grows by 5 % at most from the fewest layers to the most, and under
--memory-budget it stays below budget + 300 MB for the interpreter and torch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import synthetic

RECIPE = """\
version: 1
calibration: {data: [builtin:mixed], tokens: 4096, sequence_length: 512}
outputs:
  - name: w4a16
    format: compressed-tensors
    rules:
      - match: "role:attention|mlp|shared_expert|expert"
        scheme: {kind: int, bits: 4, group_size: 128}
        method: {kind: gptq, grid: 4, polish: 0}
      - {match: "*", keep: source}
validation: {text: [builtin:eval], context: 256, max_windows_per_file: 1}
"""
INTERPRETER_BYTES = 300 * 10**6
MOST_GROWTH = 1.05


def config(layers: int) -> dict[str, Any]:
    changes = {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": 0,
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 512,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "vocab_size": 8192,
    }
    made = synthetic.v3_config(**changes)
    made.pop("quantization_config", None)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--budget", default="1GiB", help="also one run of the most layers under this budget")
    parser.add_argument("--jobs", default="2")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="memory-growth-"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    rows: list[dict[str, Any]] = []
    for layers in arguments.layers:
        source = folder / f"layers-{layers}"
        synthetic.write_in_child(source, config(layers))
        rows.append(measure(source, recipe, layers, "--jobs", arguments.jobs))
        if layers == arguments.layers[-1]:
            limited = measure(source, recipe, layers, "--jobs", arguments.jobs, "--memory-budget", arguments.budget)
        shutil.rmtree(source)
    growth = rows[-1]["peak_rss_bytes"] / rows[0]["peak_rss_bytes"]
    budget = parse_size(arguments.budget)
    result = {
        "what": "peak RSS of convert on random V3-shaped checkpoints of equal layers",
        **synthetic.machine(),
        "recipe": RECIPE,
        "rows": rows,
        "growth": round(growth, 4),
        "growth_allowed": MOST_GROWTH,
        "under_budget": {**limited, "budget_bytes": budget, "allowed_bytes": budget + INTERPRETER_BYTES},
    }
    synthetic.write_result("memory_growth", result)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"growth from {rows[0]['layers']} to {rows[-1]['layers']} layers: {growth - 1:+.1%} (allowed +5 %)")
    peak = limited["peak_rss_bytes"]
    print(f"under {arguments.budget}: {peak / 1e6:,.0f} MB (allowed {(budget + INTERPRETER_BYTES) / 1e6:,.0f} MB)")
    raise SystemExit(int(growth > MOST_GROWTH or peak > budget + INTERPRETER_BYTES))


def parse_size(text: str) -> int:
    from quantkit.plan.recipe import parse_size as parse

    return parse(text)


def measure(source: Path, recipe: Path, layers: int, *arguments: str) -> dict[str, Any]:
    out = source.with_name(source.name + "-out")
    run = synthetic.convert(source, recipe, out, "--restart", *arguments)
    shutil.rmtree(out)
    report = run.pop("report")
    row = {"layers": layers, **run, "seconds_by_stage": {k: round(v, 1) for k, v in report["seconds"].items()}}
    print(f"{layers:>3} layers: {row['peak_rss_bytes'] / 1e6:,.0f} MB, {row['seconds']:.0f} s   {row['command']}")
    return row


if __name__ == "__main__":
    main()
