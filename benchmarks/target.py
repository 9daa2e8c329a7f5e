"""Types chosen for a size, on the peers' model: what was expected and what came out, at the bytes of hand-made recipes.

    quantkit sensitivity MODEL -o FELT --data TEXT/calibration/*.txt --tokens 32768 --sequence-length 512
    python benchmarks/target.py FELT [--tokens 32768] [--cases q4 q3 mix]     # each a conversion; rows by case
    python benchmarks/target.py FELT --fit                                    # the two coefficients of expected_kl

The cases take the bytes of Q4_K_M and Q3_K_M (embeddings and head in float32, as llama-quantize's files of
results/gguf_tiny.json have them), and those of int4 experts with int8 for the rest. --fit compares second-order losses
with outputs whose KLD other benchmarks have measured. Rows go to results/target.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantkit
from quantkit.documents.sensitivity import read_sensitivity
from quantkit.plan.allocation.expected import expected_kl
from quantkit.plan.headers import read_headers
from quantkit.plan.plan import OutputPlan, make_plan
from quantkit.plan.recipe import Recipe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from protocol import model_dir, shared_dir  # noqa: E402  (its folder is no package)

RESULTS = HERE / "results" / "target.json"
TABLES = {"match": "role:embed|lm_head", "keep": "f32"}
REST = {"match": "*", "keep": "source"}


def gguf(**more: Any) -> dict[str, Any]:
    return {"name": "gguf", "format": "gguf", **more}


def integers(experts: int, rest: int) -> dict[str, Any]:
    def rule(match: str, bits: int) -> dict[str, Any]:
        return {"match": match, "scheme": {"kind": "int", "bits": bits, "group_size": 128}}

    rules = [rule("role:expert", experts), rule("role:attention|mlp|shared_expert", rest), REST]
    return {"name": "folder", "format": "compressed-tensors", "rules": rules}


HAND: Mapping[str, tuple[dict[str, Any], Sequence[dict[str, Any]]]] = {
    "q4": (gguf(preset="Q4_K_M", rules=[TABLES]), [TABLES]),
    "q3": (gguf(preset="Q3_K_M", rules=[TABLES]), [TABLES]),
    "mix": (integers(4, 8), []),
}
"""Case -> the recipe whose bytes are the limit, and the rules that stand beside the target."""
MIXED = [{"match": f"role:{role}", "scheme": kind} for role, kind in
         (("expert", "Q3_K"), ("attention", "Q6_K"), ("mlp", "Q5_K"), ("shared_expert", "Q4_K"))]  # fmt: skip
FIT: Mapping[str, tuple[dict[str, Any], str, str, str]] = {
    "Q4_K_M": (gguf(preset="Q4_K_M", rules=[TABLES]), "gguf_tiny", "Q4_K_M", "Q4_K_M, 131,072"),
    "Q3_K_M": (gguf(preset="Q3_K_M", rules=[TABLES]), "gguf_tiny", "Q3_K_M", "Q3_K_M, 131,072"),
    "IQ4_XS": (gguf(preset="IQ4_XS", rules=[TABLES]), "gguf_tiny", "IQ4_XS", "IQ4_XS, 131,072"),
    "Q2_K": (gguf(preset="Q2_K", rules=[TABLES]), "gguf_tiny", "Q2_K", "Q2_K, 131,072"),
    "IQ4_XS, rest Q8_0": (
        gguf(rules=[TABLES, {"match": "role:expert", "scheme": "IQ4_XS"},
                    {"match": "role:attention|mlp|shared_expert", "scheme": "Q8_0"}, REST]),
        "gguf_tiny", "Q4_K_M", "Q4_K_M-bytes",
    ),
    "Q3_K, rest wider": (
        gguf(rules=[TABLES, {"match": "*.q_b_proj.weight", "scheme": "Q8_0"},
                    {"match": "*.kv_b_proj.weight", "scheme": "Q8_0"}, *MIXED, REST]),
        "gguf_tiny", "Q3_K_M", "Q3_K_M-bytes",
    ),
    "int4": (integers(4, 4), "peers_tiny", "int4", ""),
    "int3": (integers(3, 3), "peers_tiny", "int3", ""),
    "int4, rest int8": (integers(4, 8), "peers_tiny", "mixed", ""),
}  # fmt: skip
"""Output -> its recipe, and where its KLD was measured: file, scheme, beginning of the settings."""


def recipe(output: Mapping[str, Any], tokens: int, felt: Path) -> Recipe:
    text = shared_dir() / "models" / "text"
    calibration = {"data": [f"{text}/calibration/*.txt"], "tokens": tokens, "sequence_length": 512, "seed": 0}
    validation = {"text": [f"{text}/eval/*.txt"], "context": 512, "max_windows_per_file": 8}
    values = {"calibration": calibration, "sensitivity": str(felt.resolve()), "validation": validation}
    return Recipe.from_dict({"version": 1, **values, "outputs": [output]})


def planned(made: Recipe) -> OutputPlan:
    headers = read_headers(model_dir())
    return make_plan(made, headers.arch, headers.infos, headers.stored).outputs[0]


def file_bytes(made: Recipe) -> int:
    found = planned(made)
    return found.target.file_bytes(model_dir(), found.planned)


def layer_losses(made: Recipe, felt: Path) -> list[float]:
    """Second-order loss of each layer of a plan."""
    losses = read_sensitivity(felt).losses or {}
    layers: dict[int | None, float] = defaultdict(float)
    for name, decision in planned(made).decisions.items():
        if decision.scheme is not None and name in losses:
            layers[decision.spec.layer] += losses[name][decision.scheme.label]
    return list(layers.values())


def run(case: str, tokens: int, felt: Path) -> dict[str, Any]:
    """Choose, convert, and compare."""
    hand, rules = HAND[case]
    limit = file_bytes(recipe(hand, tokens, felt))
    output = {"name": hand["name"], "format": hand["format"], "target": {"size": limit}, "rules": list(rules)}
    made = quantkit.choose_types(model_dir(), recipe(output, tokens, felt))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        (found,) = quantkit.convert(model_dir(), made, Path(work) / "out").outputs
    assert found.validation is not None
    layers, kl = layer_losses(made, felt), found.validation.scores.mean_kl
    return {
        "case": case, "tokens": tokens, "limit": limit, "file_bytes": file_bytes(made), "layers": layers,
        "second_order": sum(layers), "expected": expected_kl(layers), "kld": kl.mean, "kld_se": kl.standard_error,
        "wall_s": round(time.monotonic() - start),
    }  # fmt: skip


def fit(felt: Path) -> list[dict[str, Any]]:
    """Second-order losses beside KLDs that other benchmarks measured of quantkit's GPTQ, 131,072 tokens."""
    rows: list[dict[str, Any]] = []
    for name, (output, file, scheme, settings) in FIT.items():
        found = json.loads((HERE / "results" / f"{file}.json").read_text(encoding="utf-8"))
        measured = [
            row["kld"]
            for row in found["rows"]
            if (row["name"], row["scheme"]) == ("quantkit", scheme) and row["settings"].startswith(settings)
        ]
        layers = layer_losses(recipe(output, 1024, felt), felt)
        row = {"output": name, "second_order": sum(layers), "expected": expected_kl(layers), "kld": measured[0]}
        rows.append({**row, "layers": layers})
    return rows


def facts() -> dict[str, Any]:
    """What ran where."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    return {
        "what": "tiny-deepseek-v3, 88 held-out windows of 512 tokens, KLD in nats against the BF16 weights",
        "command": "python benchmarks/target.py FELT",
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "device": cpu, "cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def coefficients(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """ROUNDING and FLIPS: least squares of expected / measured - 1."""
    features = [[sum(row["layers"]), sum(map(math.sqrt, row["layers"]))] for row in rows]
    scaled = np.array(features) / np.array([[row["kld"]] for row in rows])
    return [float(value) for value in np.linalg.lstsq(scaled, np.ones(len(rows)), rcond=None)[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("felt", type=Path, help="folder of quantkit sensitivity")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--cases", nargs="*", default=list(HAND), choices=list(HAND))
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    data = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": [], "fitted": []}
    data |= facts()
    if arguments.fit:
        data["fitted"] = fit(arguments.felt)
        longest = {row["case"]: row for row in sorted(data["rows"], key=lambda row: row["tokens"])}
        data["coefficients"] = coefficients([*data["fitted"], *longest.values()])
        hand = coefficients(data["fitted"])
        data["coefficients_without_rows"] = hand
        print(data["coefficients"], hand)
    else:
        for case in arguments.cases:
            row = run(case, arguments.tokens, arguments.felt)
            data["rows"] = [old for old in data["rows"] if (old["case"], old["tokens"]) != (case, arguments.tokens)]
            data["rows"].append(row)
            print(row, flush=True)
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
