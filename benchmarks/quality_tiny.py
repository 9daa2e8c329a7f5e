"""quantkit on the peers' model and text: converts, decodes what was written, and lets the peers' evaluator judge it.

python benchmarks/quality_tiny.py [int4 int3 mixed]        rows go to results/peers_tiny.json; then peers/table.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from safetensors.torch import save_file

from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from evaluate import evaluate_decoded, show, store  # noqa: E402  (its folder is no package)
from protocol import GROUP_SIZE, NARROW_GROUP, model_dir, narrow, shared_dir  # noqa: E402

BITS = {"int4": (4, 4), "int3": (3, 3), "mixed": (4, 8)}
"""Bits of the routed experts, and of attention, dense MLP and shared experts."""


def recipe(scheme: str, tokens: int) -> dict[str, object]:
    """GPTQ with the defaults of quantkit, 131,072 tokens in rows of 512 unless said otherwise."""
    experts, rest = BITS[scheme]
    text = shared_dir() / "models" / "text"

    def rule(match: str, bits: int, group: int = GROUP_SIZE) -> dict[str, object]:
        scheme = {"kind": "int", "bits": bits, "group_size": group}
        return {"match": match, "scheme": scheme, "method": {"kind": "gptq"}}

    return {
        "version": 1,
        "calibration": {"data": [f"{text}/calibration/*.txt"], "tokens": tokens, "sequence_length": 512, "seed": 0},
        "outputs": [
            {
                "name": scheme,
                "format": "compressed-tensors",
                "rules": [
                    *(rule(f"{name}.weight", rest, NARROW_GROUP) for name in narrow()),
                    rule("role:expert", experts),
                    rule("role:attention|mlp|shared_expert", rest),
                    {"match": "*", "keep": "source"},
                ],
            }
        ],
        "validation": {"text": [f"{text}/eval/*.txt"], "context": 512, "max_windows_per_file": 8},
    }


def convert(scheme: str, tokens: int, work: Path) -> tuple[Path, dict[str, object]]:
    """Run the command line on the model -> (folder of the result, its --json document with wall seconds)."""
    path, out = work / f"{scheme}.yaml", work / scheme
    path.write_text(yaml.safe_dump(recipe(scheme, tokens), sort_keys=False))
    command = [sys.executable, "-m", "quantkit", "convert", str(model_dir()), "-r", str(path), "-o", str(out)]
    start = time.monotonic()
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    report["wall_s"] = time.monotonic() - start
    return out, report


def decode(directory: Path, folder: Path) -> None:
    """Write every weight as a runtime computes with it, float32."""
    with FolderSource(directory, COMPRESSED_TENSORS.reader) as source:
        weights = {name: source.read(name).float() for name in source.infos()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=list(BITS), help="int4, int3, mixed")
    parser.add_argument("--tokens", type=int, default=131_072)
    arguments = parser.parse_args()
    for scheme in arguments.schemes:
        with tempfile.TemporaryDirectory() as work:
            out, report = convert(scheme, arguments.tokens, Path(work))
            decode(out, Path(work) / "decoded")
            seconds = report["seconds"]
            settings = {
                "settings": f"gptq with quantkit's defaults, {arguments.tokens:,} tokens",
                "seconds_by_stage": seconds,
                "seconds": round(seconds["total"] - seconds["validation"], 1),
                "wall_s_with_validation": round(float(report["wall_s"]), 1),
                "peak_rss_mb": round(int(report["peak_rss_bytes"]) / 1e6),
                "own_evaluation": report["outputs"][0]["validation"]["mean_kl"],
            }
            row = evaluate_decoded(Path(work) / "decoded", "quantkit", scheme, settings)
            store(row)
            show(row)


if __name__ == "__main__":
    main()
