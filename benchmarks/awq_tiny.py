"""AWQ beside rounding and GPTQ on trained models: converts, and lets `quantkit evaluate` judge all results together.

    python benchmarks/awq_tiny.py MODEL int4-g128 int3-g128-asym [--methods rtn awq gptq awq+gptq] [--tokens 16384]
    python benchmarks/awq_tiny.py MODEL --peer DIR int4-g128      # what peers/peer_llmcompressor_awq.py has left

MODEL is a folder; the text is that of the peers' comparison (benchmarks/README.md). Rows go to results/awq_tiny.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from decoded import cpu_name  # noqa: E402  (its folder is no package)
from protocol import shared_dir  # noqa: E402

RESULTS = HERE / "results" / "awq_tiny.json"
WHAT = (
    "All projections of attention, dense MLP, shared and routed experts in one scheme; router, norms, embeddings and "
    "head as the source has them. KLD in nats per token against the BF16 weights, windows of 512 tokens of held-out "
    "text, float32 arithmetic. tokens: of calibration, the same rows for all methods; the peer takes its own windows "
    "of the same text."
)
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"kind": "rtn"},
    "awq": {"kind": "awq"},
    "gptq": {"kind": "gptq"},
    "awq+gptq": {"kind": "awq", "then": {"kind": "gptq"}},
}


def scheme_of(name: str) -> dict[str, Any]:
    """ "int3-g128-asym" -> the scheme."""
    bits, group, *rest = name.split("-")
    return {"kind": "int", "bits": int(bits[3:]), "group_size": int(group[1:]), "symmetric": rest != ["asym"]}


def recipe(scheme: str, method: dict[str, Any], tokens: int, *, mtp: bool) -> dict[str, Any]:
    text = shared_dir() / "models" / "text"
    rules: list[dict[str, Any]] = [
        {"match": "role:expert|attention|mlp|shared_expert", "scheme": scheme_of(scheme), "method": method},
        *([{"match": "role:mtp", "drop": True}] if mtp else []),
        {"match": "*", "keep": "source"},
    ]
    return {
        "version": 1,
        "calibration": {"data": [f"{text}/calibration/*.txt"], "tokens": tokens, "sequence_length": 512, "seed": 0},
        "outputs": [{"name": "out", "format": "compressed-tensors", "rules": rules}],
    }


def quantkit(*words: str) -> dict[str, Any]:
    """The --json document of a command."""
    done = subprocess.run([sys.executable, "-m", "quantkit", *words, "--json"], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def convert(model: Path, scheme: str, method: str, tokens: int, work: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of the result, and what is known of the run."""
    path, out = work / f"{scheme}-{method}.yaml", work / f"{scheme}-{method}"
    mtp = bool(json.loads((model / "config.json").read_text()).get("num_nextn_predict_layers"))
    path.write_text(yaml.safe_dump(recipe(scheme, METHODS[method], tokens, mtp=mtp), sort_keys=False))
    start = time.monotonic()
    report = quantkit("convert", str(model), "-r", str(path), "-o", str(out))
    return out, {"layers_s": round(report["seconds"]["layers"], 1), "wall_s": round(time.monotonic() - start, 1)}


def evaluate(model: Path, candidates: list[Path], per_file: int) -> list[list[float]]:
    """The mean KLD of each window, for each candidate."""
    text = f"{shared_dir()}/models/text/eval/*.txt"
    words = ["--text", text, "--context", "512", "--max-windows-per-file", str(per_file), "--no-noise-floor"]
    found = quantkit("evaluate", str(model), *map(str, candidates), *words)
    return [candidate["result"]["windows"]["kld"] for candidate in found["candidates"]]


def record() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "load_average": round(os.getloadavg()[0], 1),
    }


def scored(row: dict[str, Any], klds: list[float]) -> dict[str, Any]:
    values = torch.tensor(klds, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values))
    return {
        **row,
        "kld": round(float(values.mean()), 6),
        "kld_se": round(error, 6),
        "kld_windows": klds,
        "run": record(),
    }


def store(rows: list[dict[str, Any]]) -> None:
    """Put rows into the file, in place of older ones of the same model, scheme, method and tokens."""
    known: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    keys = ("model", "scheme", "method", "tokens")
    new = [[row[key] for key in keys] for row in rows]
    rows = [row for row in known if [row[key] for key in keys] not in new] + rows
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{{"what": {json.dumps(WHAT)},\n"rows": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("schemes", nargs="+", help="int4-g128, int4-g32, int3-g128-asym, ...")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--windows-per-file", type=int, default=8)
    parser.add_argument("--peer", type=Path, help="evaluate this checkpoint in place of converting")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows: list[dict[str, Any]] = []
        folders: list[Path] = []
        common = {"model": arguments.model.name}
        if arguments.peer is not None:
            note = json.loads((arguments.peer / "run.json").read_text())
            tokens = int(note["settings"].split(", ")[-1].removesuffix(" tokens").replace(",", ""))
            (scheme,) = arguments.schemes
            row = {**common, "scheme": scheme, "method": f"llm-compressor {note['settings']}", "tokens": tokens}
            rows, folders = [{**row, "wall_s": note["seconds"]}], [arguments.peer]
        for scheme in arguments.schemes if arguments.peer is None else ():
            for method in arguments.methods:
                out, known = convert(arguments.model, scheme, method, arguments.tokens, Path(work))
                folders.append(out)
                rows.append({**common, "scheme": scheme, "method": method, "tokens": arguments.tokens, **known})
        klds = evaluate(arguments.model, folders, arguments.windows_per_file)
        rows = [scored(row, own) for row, own in zip(rows, klds, strict=True)]
        store(rows)
        for row in rows:
            print(f"{row['model']} {row['scheme']} {row['method']}: {row['kld']:.5f} ± {row['kld_se']:.5f}")


if __name__ == "__main__":
    main()
