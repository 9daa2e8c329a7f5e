"""quantkit's GGUF files of tiny-deepseek-v3, judged as the others: converts, then `rows.py` decodes and evaluates.

python benchmarks/llama_cpp/quality.py [Q4_K_M Q3_K_M IQ4_XS Q4_K_M-bytes Q3_K_M-bytes ...] [--tokens 131072]

Embeddings and head stay F32, as in the rows of llama-quantize. "-bytes": plans of quantkit's own, by role, that take no
more bytes than llama-quantize's mix of that name. "imatrix": llama-quantize's mix, rounded to nearest under the imatrix
alone (no error feedback), the same information that llama-quantize has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "peers"))

from protocol import model_dir, shared_dir  # noqa: E402  (its folder is no package)

EXACT = {"match": "role:embed|lm_head", "keep": "f32"}
REST = {"match": "*", "keep": "f32"}


LOW = ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M")


def by_role(**schemes: str) -> list[dict[str, str]]:
    return [EXACT, *({"match": f"role:{roles}", "scheme": kind} for roles, kind in schemes.items()), REST]


OUTPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"preset": name, "rules": [EXACT]}) for name in LOW},
    **{name: (name, {"preset": name, "rules": [EXACT]}) for name in ("Q4_K_M", "Q3_K_M", "IQ4_XS", "Q2_K")},
    "Q4_K_M-bytes": ("Q4_K_M", {"rules": by_role(**{"expert": "IQ4_XS", "attention|mlp|shared_expert": "Q8_0"})}),
    "Q3_K_M-bytes": (
        "Q3_K_M",
        {"rules": by_role(expert="Q3_K", attention="Q6_K", mlp="Q5_K", shared_expert="Q4_K")},
    ),
    **{
        f"{name}-imatrix": (name, {"preset": name, "rules": [EXACT], "method": {"kind": "rtn"}})
        for name in ("Q4_K_M", "Q3_K_M", "IQ4_XS", *LOW)
    },
}
"""Row -> the mix whose bytes it is held against, and the output's entries of the recipe."""


def recipe(name: str, tokens: int) -> dict[str, Any]:
    text = shared_dir() / "models" / "text"
    return {
        "version": 1,
        "calibration": {"data": [f"{text}/calibration/*.txt"], "tokens": tokens, "sequence_length": 512, "seed": 0},
        "outputs": [{"name": name, "format": "gguf", **OUTPUTS[name][1]}],
    }


def run(name: str, tokens: int, work: Path) -> None:
    path, out = work / f"{name}.yaml", work / name
    path.write_text(yaml.safe_dump(recipe(name, tokens), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "quantkit", "convert", str(model_dir()), "-r", str(path), "-o", str(out), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = json.loads(done.stdout)["seconds"]["total"]
    (file,) = (path for path in out.glob("*.gguf") if path.name != "imatrix.gguf")
    settings = f"{name}, {tokens:,} tokens; wall seconds with calibration"
    row = [str(file), "--name", "quantkit", "--scheme", OUTPUTS[name][0], "--settings", settings]
    row += ["--results", "gguf_low_bits" if OUTPUTS[name][0] in LOW else "gguf_tiny"]
    subprocess.run([sys.executable, str(HERE / "rows.py"), *row, "--seconds", f"{seconds:.1f}", "--own"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(OUTPUTS)}; all by default")
    parser.add_argument("--tokens", type=int, default=131_072)
    args = parser.parse_args()
    for name in args.names or OUTPUTS:
        with tempfile.TemporaryDirectory() as work:
            run(name, args.tokens, Path(work))


if __name__ == "__main__":
    main()
