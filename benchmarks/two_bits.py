"""What two bits cost: routed experts int2 in groups of 32, 64 and 128 beside Q2_K and int3, the rest in 8 bits.

    python benchmarks/two_bits.py [--device cuda] [--only "int2 g64" ...]

The model is tiny-deepseek-v3 with its text, as peers/ has them. Each case is a conversion by GPTQ, judged by its own
validation: KL divergence from the BF16 weights in nats over the 88 held-out windows of the peers' protocol. Bytes are
those of DeepSeek V3 by the same rules without its MTP layer, as `quantkit plan` gives them. Results:
results/two_bits.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "peers")]

from protocol import model_dir, shared_dir  # noqa: E402  (its folder is no package)
from synthetic import machine  # noqa: E402

from quantkit import convert, plan  # noqa: E402
from quantkit.plan.recipe import Recipe  # noqa: E402

RESULTS = HERE / "results" / "two_bits.json"
TOKENS = 131_072
V3 = HERE.parent / "examples" / "deepseek-v3-671b"
OTHERS = "role:attention|shared_expert|mlp"
DROP_MTP = {"match": "role:mtp", "drop": True}

Output = dict[str, Any]


def integers(bits: int, group: int) -> Output:
    """Experts on one grid, everything else that is a matrix int8 g128."""
    rules = [
        DROP_MTP,
        {"match": "role:expert", "scheme": {"kind": "int", "bits": bits, "group_size": group}},
        {"match": OTHERS, "scheme": {"kind": "int", "bits": 8, "group_size": 128}},
    ]
    gptq = [{**rule, "method": {"kind": "gptq"}} if "scheme" in rule else rule for rule in rules]
    return {"format": "compressed-tensors", "rules": [*gptq, {"match": "*", "keep": "source"}]}


def blocks(experts: str) -> Output:
    """Experts in one block type of llama.cpp, everything else that is a matrix Q8_0."""
    rules = [{"match": "role:embed|lm_head", "keep": "bf16"}, {"match": "role:expert", "scheme": experts}]
    return {"format": "gguf", "rules": [*rules, {"match": OTHERS, "scheme": "Q8_0"}, {"match": "*", "keep": "f32"}]}


CASES: dict[str, Output] = {
    "int2 g64": integers(2, 64),
    "Q2_K": blocks("Q2_K"),
    "int2 g32": integers(2, 32),
    "int2 g128": integers(2, 128),
    "int3 g128": integers(3, 128),
}
"""The routed experts -> output of the recipe."""


def recipe(output: Output, *, validated: bool) -> Recipe:
    text = shared_dir() / "models" / "text"
    document: dict[str, Any] = {
        "version": 1,
        "calibration": {"data": [f"{text}/calibration/*.txt"], "tokens": TOKENS, "sequence_length": 512, "seed": 0},
        "outputs": [{"name": "main", **output}],
    }
    if validated:
        document["validation"] = {"text": [f"{text}/eval/*.txt"], "context": 512, "max_windows_per_file": 8}
    return Recipe.model_validate(document)


def measured(output: Output, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """One conversion -> what its validation found, and the bytes of DeepSeek V3."""
    with tempfile.TemporaryDirectory() as folder:
        report = convert(model_dir(), recipe(output, validated=True), Path(folder) / "out", device=device)
    (found,) = report.outputs
    assert found.validation is not None
    scores = found.validation.scores
    (planned,) = plan(V3, recipe(output, validated=False)).outputs
    return {
        "bytes_of_v3": planned.nbytes,
        "bpw_of_v3": round(planned.bpw, 3),
        "windows": scores.windows,
        "mean_kl": scores.mean_kl.model_dump(),
        "perplexity_ratio": scores.perplexity_ratio.model_dump(),
        "top1": scores.top1.mean,
        "seconds": round(report.total_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    cases = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else {}
    for name in given.only:
        cases[name] = {**measured(CASES[name], given.device), **machine()}
        print(name, json.dumps(cases[name]), flush=True)
        head = {"what": "routed experts in two bits, the rest in eight; tiny-deepseek-v3", "tokens": TOKENS}
        document = {**head, "command": "python benchmarks/two_bits.py", **machine(), "cases": cases}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
