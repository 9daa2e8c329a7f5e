"""GPTQ with and without output Hessians on a trained model: a Fisher pass, conversions, one evaluation of all results.

    python benchmarks/output_aware_tiny.py MODEL int3-g128 int4-g128 [--tokens 131072] [--fisher-tokens 32768]

MODEL is a folder; the text is that of the peers' comparison (benchmarks/README.md). Differences are paired over
windows. Rows go to results/output_aware_tiny.json with --store.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from awq_tiny import evaluate, quantkit, recipe, record
from protocol import shared_dir

RESULTS = Path(__file__).resolve().parent / "results" / "output_aware_tiny.json"


def convert(model: Path, scheme: str, tokens: int, fisher: Path | None, work: Path) -> tuple[Path, float]:
    """Folder of the result, and seconds of its layers."""
    method = {"kind": "gptq", "output_aware": fisher is not None}
    mtp = bool(json.loads((model / "config.json").read_text()).get("num_nextn_predict_layers"))
    document = recipe(scheme, method, tokens, mtp=mtp)
    if fisher is not None:
        document["sensitivity"] = str(fisher)
    name = f"{scheme}-{'aware' if fisher else 'plain'}"
    path, out = work / f"{name}.yaml", work / name
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    report = quantkit("convert", str(model), "-r", str(path), "-o", str(out))
    return out, round(report["seconds"]["layers"], 1)


def fisher_pass(model: Path, tokens: int, work: Path) -> tuple[Path, float]:
    """Folder of the pass, and its seconds."""
    out, start = work / "fisher", time.monotonic()
    text = f"{shared_dir()}/models/text/calibration/*.txt"
    words = ("--data", text, "--tokens", str(tokens), "--sequence-length", "512")
    quantkit("sensitivity", str(model), "-o", str(out), *words)
    return out, round(time.monotonic() - start, 1)


def paired(plain: list[float], aware: list[float]) -> dict[str, float]:
    """Means, and the relative change with its standard error over windows."""
    before, after = (torch.tensor(values, dtype=torch.float64) for values in (plain, aware))
    change, mean = after - before, float(before.mean())
    error = float(change.std()) / math.sqrt(len(change))
    return {
        "kld, plain": round(mean, 6),
        "kld, output-aware": round(float(after.mean()), 6),
        "change": round(float(change.mean()) / mean, 4),
        "change_se": round(error / mean, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("schemes", nargs="+", help="int4-g128, int3-g128, ...")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--fisher-tokens", type=int, default=32_768)
    parser.add_argument("--windows-per-file", type=int, default=8)
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        fisher, fisher_s = fisher_pass(arguments.model, arguments.fisher_tokens, Path(work))
        for scheme in arguments.schemes:
            made = [convert(arguments.model, scheme, arguments.tokens, one, Path(work)) for one in (None, fisher)]
            klds = evaluate(arguments.model, [folder for folder, _ in made], arguments.windows_per_file)
            sizes = {"tokens": arguments.tokens, "fisher tokens": arguments.fisher_tokens, "fisher_s": fisher_s}
            seconds = {"layers_s, plain": made[0][1], "layers_s, output-aware": made[1][1]}
            rows.append({"model": arguments.model.name, "scheme": scheme, **sizes, **seconds, **paired(*klds)})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.store:
        RESULTS.write_text(json.dumps({**record(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
