"""GPTQ on the processor: seconds of each stage with the compiled kernels, and with their twins in torch.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_gptq.py [--repeats 3] [--threads 2] [--no-convert] [--scale 1]

Two batches: one gate of DeepSeek V3 (2048 x 7168), and eight small experts (256 x 512). int4, groups of 128, activation
order, 40 candidates of both signs, two rounds of polish; inputs are correlated, with outlier channels. Kernel and twin
take turns on the same factor, so that whatever else the machine does disturbs both; medians count, and the least time
is given too. Then `quantkit convert examples/nano-deepseek-v3 -r nano-demo`, a process each, in turn with and without
kernels. The loss is tr(E H E^T) of what is stored, the kernels' divided by the twin's. ``cold_compile_s``: how
much more processor time the first calls take where nothing is cached.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import synthetic
import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, using
from quantkit.quantizers.ldlq import factor as ldlq_factor
from quantkit.quantizers.ldlq import polish as ldlq_polish
from quantkit.quantizers.ldlq import sweep as ldlq_sweep
from quantkit.schemes import IntScheme

SCHEME = IntScheme(bits=4, group_size=128)
SHAPES = {"gate of DeepSeek V3": (1, 2048, 7168), "eight small experts": (8, 256, 512)}
TWIN_OPTION = "--as-twin"
Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-convert", action="store_true")
    parser.add_argument("--scale", type=int, default=1, help="divide rows and columns, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cold = cold_compile_seconds()
    shapes = {
        name: (b, out // arguments.scale, n // (128 * arguments.scale) * 128 or 128)
        for name, (b, out, n) in SHAPES.items()
    }
    SCHEME.fit(torch.ones(16, 128))  # loads what was compiled
    rows = [measure(name, shape, arguments.repeats) for name, shape in shapes.items()]
    convert = {} if arguments.no_convert else {"convert_nano_s": convert_seconds(arguments.repeats, arguments.threads)}
    synthetic.write_result(
        "cpu_gptq",
        {
            "what": "GPTQ int4 on the processor: compiled kernels beside their torch twins, in turn",
            **synthetic.machine(),
            "numba": version("numba"),
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "cold_compile_s": cold,
            "rows": rows,
            **convert,
        },
    )


def correlated(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Weight (B, out, in) and Hessian (B, in, in) of twice as many tokens as columns: some directions in common, few
    channels 20 times as large, tokens of different size."""
    n_matrices, out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(64, in_features, generator=generator) / 8
    inputs = torch.randn(2 * in_features, 64, generator=generator) @ common
    inputs += torch.randn(inputs.shape, generator=generator)
    inputs[:, torch.rand(in_features, generator=generator) < 0.006] *= 20
    inputs *= (0.5 * torch.randn(len(inputs), 1, generator=generator)).exp()
    hessian = (inputs.T @ inputs / len(inputs)).expand(n_matrices, in_features, in_features).contiguous()
    return torch.randn(shape, generator=generator) * 0.02, hessian


def measure(name: str, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    weight, hessian = correlated(shape)
    seconds: dict[str, dict[str, list[float]]] = {"kernels": {}, "twin": {}}
    losses: dict[str, float] = {}
    scales: dict[str, Tensor] = {}
    factor, factor_s = timed(lambda: ldlq_factor.factorize(hessian, 0.01, act_order=True))
    importance = factor.hessian.diagonal(dim1=-2, dim2=-1)

    def once(kind: str) -> None:
        grid, search_s = timed(lambda: SCHEME.grid(weight, importance, points=40, signed=True))
        codes, sweep_s = timed(lambda: ldlq_sweep.sweep(grid, weight, factor))
        polished, polish_s = timed(lambda: ldlq_polish.polish(grid, weight, codes, factor.hessian, 2))
        stages = {"search": search_s, "sweep": sweep_s, "polish": polish_s, "all": search_s + sweep_s + polish_s}
        for stage, spent in stages.items():
            seconds[kind].setdefault(stage, []).append(spent)
        error = weight - SCHEME.decode(polished.codes, polished.scale)
        scales[kind] = grid.scale
        losses[kind] = float(ldlq_factor.row_loss(error, factor.hessian).double().sum())

    for _ in range(repeats):
        with using(Backend.TORCH):
            once("twin")
        once("kernels")
    row: dict[str, Any] = {"what": name, "shape": list(shape), "factor_s": round(factor_s, 3)}
    for kind, stages in seconds.items():
        row[f"{kind}_s"] = {stage: round(statistics.median(found), 4) for stage, found in stages.items()}
        row[f"{kind}_least_s"] = {stage: round(min(found), 4) for stage, found in stages.items()}
    row["speed_ratio"] = {
        stage: round(statistics.median(t / k for t, k in zip(found, seconds["kernels"][stage], strict=True)), 2)
        for stage, found in seconds["twin"].items()
    }
    row["loss_ratio"] = round(losses["kernels"] / losses["twin"], 6)
    row["scales_equal"] = round(float((scales["kernels"] == scales["twin"]).double().mean()), 5)
    print(name, row["kernels_s"], "twin", row["twin_s"], "loss", row["loss_ratio"], flush=True)
    return row


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def cold_compile_seconds() -> float:
    """First calls of all three in a process that has nothing compiled, less those of one that has."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(synthetic.ROOT)}
        command = [sys.executable, __file__, "--first-calls"]
        first, second = (
            float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        )
    return round(first - second, 2)


def first_calls() -> float:
    weight, hessian = correlated((1, 16, 128))

    def stages() -> None:
        factor = ldlq_factor.factorize(hessian, 0.01, act_order=True)
        grid = SCHEME.grid(weight, factor.hessian.diagonal(dim1=-2, dim2=-1), points=40, signed=True)
        ldlq_polish.polish(grid, weight, ldlq_sweep.sweep(grid, weight, factor), factor.hessian, 1)

    start = time.process_time()
    stages()
    return time.process_time() - start


def convert_seconds(repeats: int, threads: int) -> dict[str, Any]:
    """Of `quantkit convert`, start of the interpreter included; the first of each is not counted."""
    found: dict[str, list[float]] = {"twin": [], "kernels": []}
    for _ in range(repeats + 1):
        for kind, spent in found.items():
            spent.append(converted(kind, threads))
    medians = {kind: round(statistics.median(spent[1:]), 2) for kind, spent in found.items()}
    least = {f"{kind}_least": round(min(spent[1:]), 2) for kind, spent in found.items()}
    print("convert nano", medians, least, flush=True)
    return {**medians, **least}


def converted(kind: str, threads: int) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(synthetic.ROOT)}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as quantkit sets it, but here torch is loaded before
    with tempfile.TemporaryDirectory() as folder:
        options = [str(synthetic.TOKENIZER_FROM), "-r", "nano-demo", "-o", str(Path(folder) / "made")]
        command = [sys.executable, __file__, TWIN_OPTION if kind == "twin" else "--as-is", "convert", *options]
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return time.perf_counter() - start


def command_line(arguments: list[str], *, twin: bool) -> None:
    from quantkit.cli.app import main as quantkit

    with patch.object(sys, "argv", ["quantkit", *arguments]), using(Backend.TORCH) if twin else nullcontext():
        quantkit()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--first-calls"]:
            print(first_calls())
        case ["--as-twin" | "--as-is" as choice, *rest]:
            command_line(rest, twin=choice == TWIN_OPTION)
        case _:
            main()
