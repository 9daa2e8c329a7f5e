"""Speed and error of quantkit's encoding to ggml's block types beside libggml's own, on one core.

    python benchmarks/ggml_encode.py [--types Q4_K IQ4_XS ...] [--rows 2048] [--pairs 3] [--floors]
    python benchmarks/ggml_encode.py --low-bits --rows 256    # types with a codebook and Q2_0: ggml_low_bits.json

Both get the same (rows, 7168) matrix and the same importance, gamma(1)^2 of each column, and give bytes: libggml by
ggml_quantize_chunk, quantkit by fit + encode + pack, or the search of types with a codebook. They take turns; time is
processor time, so that a busy machine disturbs little, and the median of the pairs' ratios counts. Error:
importance-weighted squared error of what libggml decodes, ours divided by theirs, on normal weights, Student's t of 3
degrees of freedom, and normal weights of which one in 200 is 20 times larger. With ``--floors``, exit with 1 where a
target is missed: no more error for any type, and the speeds of FLOORS.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import synthetic
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantkit.schemes import GgmlScheme
from quantkit.schemes.ggml.fit import fit
from quantkit.schemes.ggml.types import BLOCK_TYPES, BlockType
from tests.oracles import ggml

IN_FEATURES = 7168
ERROR_ROWS = 256
FLOORS = {"Q4_K": 3.0, "IQ4_XS": 3.0, "Q6_K": 1.0, "Q3_K": 1.0}
"""Least speed, in units of libggml's."""
LOW_BITS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=[name for name, kind in BLOCK_TYPES.items() if kind.levels])
    parser.add_argument("--low-bits", action="store_true")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--floors", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = LOW_BITS if arguments.low_bits else arguments.types
    rows = [measure(BLOCK_TYPES[name], arguments.rows, arguments.pairs) for name in names]
    missed = [row["type"] for row in rows if row["speed_ratio"] < FLOORS.get(row["type"], 0)]
    missed += [row["type"] for row in rows if max(row["error_ratio"].values()) > 1]
    synthetic.write_result(
        "ggml_low_bits" if arguments.low_bits else "ggml_encode",
        {
            "what": "encoding to ggml's block types on one core: quantkit (fit + encode + pack) beside libggml",
            **synthetic.machine(),
            "libggml": version("libggml-python"),
            "numba": version("numba"),
            "shape": [arguments.rows, IN_FEATURES],
            "error_shape": [ERROR_ROWS, IN_FEATURES],
            "pairs": arguments.pairs,
            "rows": rows,
        },
    )
    if missed:
        print("below target:", ", ".join(missed))
    raise SystemExit(int(arguments.floors and bool(missed)))


def measure(kind: BlockType, rows: int, pairs: int) -> dict[str, Any]:
    """One type: millions of weights a second of both, and errors."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.empty(IN_FEATURES).exponential_(generator=generator).square()
    weight = torch.randn(rows, IN_FEATURES, generator=generator) * 0.02
    theirs(kind, weight[:1], importance)  # fills ggml's tables
    ours(kind, weight[:16], importance)  # compiles, or loads what was compiled
    fit_seconds, our_seconds, their_seconds = [], [], []
    for _ in range(pairs):
        their_seconds.append(cpu_seconds(lambda: theirs(kind, weight, importance)))
        our_seconds.append(cpu_seconds(lambda: ours(kind, weight, importance)))
        if kind.levels:
            fit_seconds.append(cpu_seconds(lambda: fit(kind, weight, importance)))
    ratios = [other / own for other, own in zip(their_seconds, our_seconds, strict=True)]
    row = {
        "type": kind.name,
        "speed_ratio": round(statistics.median(ratios), 2),
        "quantkit_mweights_s": round(weight.numel() / min(our_seconds) / 1e6, 1),
        "libggml_mweights_s": round(weight.numel() / min(their_seconds) / 1e6, 1),
        "error_ratio": error_ratios(kind, importance),
    }
    if fit_seconds:
        row["quantkit_fit_only_mweights_s"] = round(weight.numel() / min(fit_seconds) / 1e6, 1)
    errors = "  ".join(f"{name} {value:.4f}" for name, value in row["error_ratio"].items())
    print(
        f"{kind.name:7} {row['speed_ratio']:6.2f}x  {row['quantkit_mweights_s']:6.1f} M/s against "
        f"{row['libggml_mweights_s']:6.1f}   error: {errors}",
        flush=True,
    )
    return row


def error_ratios(kind: BlockType, importance: Tensor) -> dict[str, float]:
    """Our error divided by libggml's, by distribution, with and without importance."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(ERROR_ROWS, IN_FEATURES, generator=generator) * 0.02
    spread = torch.randn(3, ERROR_ROWS, IN_FEATURES, generator=generator).square().sum(0).div(3).sqrt()
    large = torch.rand(ERROR_ROWS, IN_FEATURES, generator=generator) < 0.005
    weights = {"normal": normal, "student": normal / spread, "outliers": torch.where(large, normal * 20, normal)}
    ratios: dict[str, float] = {}
    for name, weight in weights.items():
        for suffix, used in (("", None), ("+importance", importance)):
            own, other = (
                error(weight, ggml.dequantize(kind.name, blocks), used)
                for blocks in (ours(kind, weight, used), theirs(kind, weight, used))
            )
            ratios[name + suffix] = round(own / other, 4)
    return ratios


def ours(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor:
    scheme = GgmlScheme.model_validate({"type": kind.name})
    return scheme.rounded(weight, importance, points=0, signed=True)["blocks"]


def theirs(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """Some types only with an importance: then all inputs have the same."""
    if importance is None and ggml.needs_importance(kind.name):
        importance = torch.ones(IN_FEATURES)
    return ggml.quantize(kind.name, weight, importance)


def error(weight: Tensor, decoded: Tensor, importance: Tensor | None) -> float:
    squared = (weight - decoded).double().square()
    return float((squared if importance is None else squared * importance).sum())


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
