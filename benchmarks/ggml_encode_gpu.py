"""Encoding DeepSeek V3's routed experts to ggml's block types on one GPU: weights per second, and the error left.

    python benchmarks/ggml_encode_gpu.py [--types Q4_K Q6_K ...] [--experts 32] [--repeats 5] [--out results/x.json]

Batches of experts, gate or up (2048 x 7168) and down (7168 x 2048), lie in bfloat16 on the device, with an importance
of each input (gamma(1)^2), and become packed blocks: to float32, fit, encode, pack. Times are medians between
synchronisations. A layer is 256 experts of two of the former and one of the latter, 11.27 G weights; its seconds are
those of the batches, times how many of them it has.

Error: importance-weighted squared error of what is decoded, divided by what the torch twin leaves on the same matrix,
and by libggml's where it can be imported. `--scale 32` divides all sizes, to try the script anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gptq_expert import DEVICE, machine, structured_weight, synchronize, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantkit.kernels.backend import Backend
from quantkit.schemes.ggml.fit import encode, fit, fit_in_torch
from quantkit.schemes.ggml.layout import decode, pack
from quantkit.schemes.ggml.measure import nearest_codes, shares
from quantkit.schemes.ggml.types import BLOCK_TYPES, BlockParams, BlockType

EXPERTS = 256
LIBGGML_MWEIGHTS_S = {"Q3_K": 21.8, "Q4_K": 7.5, "Q6_K": 27.1, "IQ4_XS": 3.7}
"""ggml_quantize_chunk of libggml-python 0.20.2.post1 with importance, one thread of an EPYC: our own measurement."""
SHARED = {"gate or up": 2, "down": 1}
"""Matrices of an expert."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q6_K", "Q3_K", "IQ4_XS"], choices=sorted(BLOCK_TYPES))
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ggml_encode_gpu.json")
    arguments = parser.parse_args()
    hidden, inter = 7168 // arguments.scale // 256 * 256, max(256, 2048 // arguments.scale)
    shapes = {"gate or up": (inter, hidden), "down": (hidden, inter)}
    batches = {name: batch(arguments.experts, *shape) for name, shape in shapes.items()}
    result: dict[str, Any] = {
        "what": (__doc__ or "").splitlines()[0],
        **machine(),
        "kernels": Backend.of(DEVICE) is Backend.TRITON,
        "experts of a batch": arguments.experts,
        "shapes": shapes,
        "repeats": arguments.repeats,
        "of a layer": EXPERTS,
    }
    for name in arguments.types:
        kind = BLOCK_TYPES[name]
        result[name] = {**timed(kind, batches, arguments.repeats), **quality(kind, hidden)}
        print(name, json.dumps(result[name], indent=1), flush=True)
        write(result, arguments.out)


def batch(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights (experts, rows, columns) bfloat16 and their importance (experts, columns)."""
    weight = torch.stack([structured_weight(rows, columns, seed).bfloat16() for seed in range(experts)])
    return weight, gamma(experts, columns)


def gamma(*shape: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(99)
    return torch.empty(*shape, device=DEVICE).exponential_(generator=generator).square()


def timed(kind: BlockType, batches: dict[str, tuple[Tensor, Tensor]], repeats: int) -> dict[str, Any]:
    stages: dict[str, dict[str, float]] = {}
    layer_s = fit_s = 0.0
    for weight, importance in batches.values():
        blocks_of(kind, weight[:1], importance[:1])  # compiles, or loads what was compiled
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for name, (weight, importance) in batches.items():
        values = weight.float()
        params = fit(kind, values, importance)
        codes = encode(kind, values, params)
        calls: dict[str, Callable[[], object]] = {
            "fit": lambda values=values, importance=importance: fit(kind, values, importance),
            "encode": lambda values=values, params=params: encode(kind, values, params),
            "pack": lambda codes=codes, params=params: pack(kind, codes, params),
            "all, from bfloat16": lambda weight=weight, importance=importance: blocks_of(kind, weight, importance),
        }
        stages[name] = {stage: median_s(call, repeats) for stage, call in calls.items()}
        per_layer = SHARED[name] * EXPERTS / len(weight)
        layer_s += per_layer * stages[name]["all, from bfloat16"]
        fit_s += per_layer * stages[name]["fit"]
    weights = sum(SHARED[name] * EXPERTS * weight[0].numel() for name, (weight, _) in batches.items())
    peer = LIBGGML_MWEIGHTS_S.get(kind.name)
    return {
        "G weights/s": round(weights / layer_s / 1e9, 3),
        "s a layer": round(layer_s, 3),
        "of it fit": round(fit_s, 3),
        "G weights of a layer": round(weights / 1e9, 3),
        "libggml, core-seconds a layer": peer and round(weights / peer / 1e6),
        "ms of a batch by stage": {
            name: {stage: round(1e3 * seconds, 2) for stage, seconds in found.items()} for name, found in stages.items()
        },
        "peak bytes": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None,
        "fit: arithmetic": arithmetic(kind, weights, fit_s),
    }


def arithmetic(kind: BlockType, weights: int, seconds: float) -> dict[str, Any]:
    """What the search computes: how often it measures a weight on some scale, and the float operations of that (a fused
    multiply-add is two), of the 15 to 20 instructions that it takes."""
    tried = len(shares(kind))
    if kind.offset:
        measures = 3 * (tried + 1) + 8 * 7 if kind.sub_scale else 3 * (tried + 1) + 24
        operations = 19
    else:
        measures = tried + 4 * 4 + 10 if kind.sub_scale else tried + 4 + 9
        operations = 14
    return {
        "measures of a weight": measures,
        "operations of a measure": operations,
        "TFLOP/s": round(weights * measures * operations / seconds / 1e12, 2),
    }


def median_s(call: Callable[[], object], repeats: int) -> float:
    call()
    seconds: list[float] = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def blocks_of(kind: BlockType, weight: Tensor, importance: Tensor) -> Tensor:
    values = weight.float()
    params = fit(kind, values, importance)
    return pack(kind, encode(kind, values, params), params)


def quality(kind: BlockType, columns: int) -> dict[str, Any]:
    """Our error divided by the twin's and by libggml's, and the twin's speed."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    rows = 256 if DEVICE.type == "cuda" else 16
    normal = torch.randn(rows, columns, generator=generator, device=DEVICE) * 0.02
    spread = torch.randn(3, rows, columns, generator=generator, device=DEVICE).square().sum(0).div(3).sqrt()
    large = torch.rand(rows, columns, generator=generator, device=DEVICE) < 0.005
    matrices = {
        "heavier than normal": structured_weight(rows, columns, 5),
        "normal": normal,
        "student": normal / spread,
        "outliers": torch.where(large, normal * 20, normal),
    }
    importance = gamma(columns)
    twin: dict[str, float] = {}
    libggml: dict[str, float] = {}
    differing: dict[str, float] = {}
    for name, weight in matrices.items():
        own, of_twin = fit(kind, weight, importance), fit_in_torch(kind, weight, importance)
        left = error(kind, weight, own, importance)
        twin[name] = round(left / error(kind, weight, of_twin, importance), 6)
        differing[name] = round(float((own.d != of_twin.d).float().mean()), 4)
        if find_spec("libggml") and find_spec("gguf"):
            from tests.oracles import ggml

            theirs = ggml.dequantize(kind.name, ggml.quantize(kind.name, weight.cpu(), importance.cpu()))
            libggml[name] = round(left / squared(weight, theirs.to(DEVICE), importance), 4)
    return {
        "error / torch twin's": twin,
        "error / libggml's": libggml or None,
        "d that differ from the twin's": differing,
        "torch twin, M weights/s (fit)": round(
            normal.numel() / median_s(lambda: fit_in_torch(kind, normal, importance), 1) / 1e6, 1
        ),
    }


def error(kind: BlockType, weight: Tensor, params: BlockParams, importance: Tensor) -> float:
    return squared(weight, decode(kind, pack(kind, nearest_codes(kind, weight, params), params)), importance)


def squared(weight: Tensor, decoded: Tensor, importance: Tensor) -> float:
    return float(((weight - decoded).double().square() * importance).sum())


if __name__ == "__main__":
    main()
