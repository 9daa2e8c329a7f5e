"""Converts a checkpoint of DeepSeek V3's true widths under a memory budget: no step may hide a whole-layer surprise.

    python benchmarks/true_width.py [--folder DIR] [--budget 6GiB] [--scale 1] [--experts 4] [--vocab 16384]
                                    [--tokens 4096] [--jobs N]

Hidden 7168, dense MLP 18432, experts 2048, 128 heads, MLA ranks 1536 and 512, FP8 blocks: one dense layer and one MoE
layer with few experts, random weights, every linear int4 by GPTQ. --scale 8 divides the widths, for a trial of the
script. Claim: peak RSS stays below budget + 300 MB for the interpreter and torch.
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
calibration: {{data: [builtin:mixed], tokens: {tokens}, sequence_length: 1024}}
outputs:
  - name: w4a16
    format: compressed-tensors
    rules:
      - match: "role:attention|mlp|shared_expert|expert"
        scheme: {{kind: int, bits: 4, group_size: 128}}
        method: {{kind: gptq}}
      - {{match: "*", keep: source}}
validation: {{text: [builtin:eval], context: 256, max_windows_per_file: 1}}
"""
INTERPRETER_BYTES = 300 * 10**6


def config(scale: int, experts: int, vocab: int) -> dict[str, Any]:
    return synthetic.v3_config(
        num_hidden_layers=2,
        num_nextn_predict_layers=0,
        first_k_dense_replace=1,
        hidden_size=7168 // scale,
        intermediate_size=18432 // scale,
        moe_intermediate_size=2048 // scale,
        num_attention_heads=128 // scale,
        num_key_value_heads=128 // scale,
        q_lora_rank=1536 // scale // 128 * 128,
        kv_lora_rank=max(512 // scale, 128),
        n_routed_experts=experts,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        vocab_size=vocab,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes (default: a temporary folder)")
    parser.add_argument("--budget", default="6GiB")
    parser.add_argument("--scale", type=int, choices=(1, 2, 4, 8), default=1)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--jobs", default="2")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="true-width-"))
    source, recipe, out = folder / "model", folder / "recipe.yaml", folder / "out"
    synthetic.write_in_child(source, config(arguments.scale, arguments.experts, arguments.vocab))
    recipe.write_text(RECIPE.format(tokens=arguments.tokens))
    limits = ["--memory-budget", arguments.budget, "--jobs", arguments.jobs, "--device", "cpu", "--restart"]
    run = synthetic.convert(source, recipe, out, *limits)
    report = run.pop("report")
    budget = parse_size(arguments.budget)
    result = {
        "what": "convert of a random checkpoint of DeepSeek V3's true widths (one dense and one MoE layer), FP8 source",
        **synthetic.machine(),
        "scale": arguments.scale,
        "experts": arguments.experts,
        "source_bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "recipe": recipe.read_text(),
        **run,
        "seconds_by_stage": {stage: round(seconds, 1) for stage, seconds in report["seconds"].items()},
        "tokens": report["tokens"],
        "budget_bytes": budget,
        "allowed_bytes": budget + INTERPRETER_BYTES,
    }
    synthetic.write_result("true_width" if arguments.scale == 1 else "true_width_trial", result)
    if arguments.folder is None:
        shutil.rmtree(folder)
    peak, allowed = run["peak_rss_bytes"], budget + INTERPRETER_BYTES
    print(
        f"peak RSS {peak / 1e6:,.0f} MB, allowed {allowed / 1e6:,.0f} MB; {run['seconds']:.0f} s: {report['seconds']}"
    )
    raise SystemExit(int(peak > allowed))


def parse_size(text: str) -> int:
    from quantkit.plan.recipe import parse_size as parse

    return parse(text)


if __name__ == "__main__":
    main()
