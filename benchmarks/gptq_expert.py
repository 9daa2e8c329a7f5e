"""GPTQ of DeepSeek V3's routed experts on one GPU: seconds of each stage, and what the fast arithmetic costs.

    python benchmarks/gptq_expert.py [--experts 16] [--tokens 16384] [--repeats 5] [--out results/gptq_expert.json]

One expert is gate and up (2048 x 7168 each, swept together with one factor) and down (7168 x 2048): int4, groups of
128, activation order, the weighted search of signed scales. Inputs are correlated, with outlier channels and
heavy-tailed tokens, in bfloat16. Times are medians for a whole batch of experts, divided by their number, between
synchronisations.

Quality: tr(E H E^T) of one expert against the float64 oracle (float64 Hessian, Cholesky, search and sweep), at all
tokens and at fewer tokens than inputs; and the share of codes that differ from the float32 twin on the same factor and
scales.
`--scale 32` divides all sizes, to try the script anywhere. A third run adds the cross term of gate and up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, backend_of, using
from quantkit.quantizers.ldlq import factor as ldlq_factor
from quantkit.quantizers.ldlq import polish as ldlq_polish
from quantkit.quantizers.ldlq import sweep as ldlq_sweep
from quantkit.schemes import IntScheme

SCHEME = IntScheme(bits=4, group_size=128)
DAMP = 0.01
POINTS = 40
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sizes:
    hidden: int
    inter: int
    tokens: int
    experts: int


@dataclass
class Clock:
    """Seconds of each stage, by repeat."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def medians_ms(self, experts: int) -> dict[str, float]:
        return {name: round(1e3 * statistics.median(found) / experts, 3) for name, found in self.seconds.items()}


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def structured_inputs(sizes: Sizes, tokens: int, seed: int) -> Tensor:
    """(tokens, hidden) bfloat16: a few hundred common directions, 0.6 % of channels 20 times as large, and tokens of
    very different size."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    rank = sizes.hidden // 8
    spectrum = torch.linspace(0, -3, rank, device=DEVICE).exp()
    x = (normal(tokens, rank) * spectrum) @ normal(rank, sizes.hidden) / rank**0.5 + 0.15 * normal(tokens, sizes.hidden)
    channels = (0.5 * normal(sizes.hidden)).exp()
    channels[torch.randperm(sizes.hidden, generator=generator, device=DEVICE)[: max(1, sizes.hidden * 6 // 1000)]] *= 20
    return (x * channels * (0.7 * normal(tokens, 1)).exp()).bfloat16()


def structured_weight(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) float32 of bfloat16 values, tails heavier than normal."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator, device=DEVICE)
    row_size = (0.2 * torch.randn(rows, 1, generator=generator, device=DEVICE)).exp()
    return (0.02 * row_size * normal * (1 + 0.1 * normal.square())).bfloat16().float()


def moments(inputs: list[Tensor]) -> Tensor:
    """(experts, in, in) float32 means of x x^T over tokens."""
    sums = torch.zeros(len(inputs), inputs[0].shape[1], inputs[0].shape[1], device=DEVICE)
    for one, x in zip(sums, inputs, strict=True):
        if backend_of(sums) is Backend.TRITON:
            from quantkit.kernels.triton.moments import add_squares_

            add_squares_(one, x, 1 / len(x))
        else:
            one.addmm_(x.float().T, x.float(), alpha=1 / len(x))
    return sums


def cross_moments(inputs: list[Tensor], originals: list[Tensor]) -> Tensor:
    """(experts, in, in) float32 means of (x_original - x) x^T over tokens."""
    sums = torch.empty(len(inputs), inputs[0].shape[1], inputs[0].shape[1], device=DEVICE)
    for one, x, original in zip(sums, inputs, originals, strict=True):
        drift = (original - x).T
        if backend_of(sums) is Backend.TRITON:
            one.copy_(torch.mm(drift, x, out_dtype=torch.float32))
        else:
            one.copy_(drift.float() @ x.float())
        one /= len(x)
    return sums


@dataclass(frozen=True)
class Run:
    """What is timed. ``originals``: what the unquantised stream has in place of the inputs, or None."""

    polish: int
    originals: list[Tensor] | None = None


def quantise(clock: Clock, part: str, weight: Tensor, inputs: list[Tensor], run: Run) -> ldlq_polish.Polished:
    """weight (B, out, in) on inputs (tokens, in) of each expert, stage by stage."""
    with clock.stage(f"{part} hessian"):
        hessian = moments(inputs)
    with clock.stage(f"{part} factor"):
        factor = ldlq_factor.factorize(hessian, DAMP, act_order=True)
    assert factor.damping == 1.0, "the damping had to be raised"
    if run.originals is not None and part == "gate+up":
        with clock.stage(f"{part} cross moments"):
            cross = cross_moments(inputs, run.originals)
        with clock.stage(f"{part} targets"):
            weight = ldlq_factor.towards_original(weight, cross, factor, 0.5)
        del cross
    with clock.stage(f"{part} scales"):
        grid = SCHEME.grid(weight, factor.hessian.diagonal(dim1=-2, dim2=-1), points=POINTS, signed=True)
    loss = weight.new_zeros(weight.shape[:2])
    with clock.stage(f"{part} sweep"):
        codes = ldlq_sweep.sweep(grid, weight, factor, loss)
    if not run.polish:
        return ldlq_polish.Polished(codes, grid.scale, grid.offset, loss)
    with clock.stage(f"{part} polish"):
        return ldlq_polish.polish(grid, weight, codes, factor.hessian, run.polish)


def experts_once(clock: Clock, gate_up: Tensor, down: Tensor, x: list[Tensor], run: Run) -> None:
    polished = quantise(clock, "gate+up", gate_up, x, run)
    with clock.stage("hidden"):
        quantised = SCHEME.decode(polished.codes, polished.scale).bfloat16()
        hidden = [both(one, tokens) for one, tokens in zip(quantised, x, strict=True)]
    del polished, quantised
    quantise(clock, "down", down, hidden, run)


def both(gate_up: Tensor, x: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# Quality


@dataclass(frozen=True)
class Exact:
    """A float64 `Grid` with scales that can be stored."""

    scale: Tensor
    zero: float = 8.0
    offset: None = None
    table: None = None
    top: int = 15

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        raise AssertionError

    nearest_offset = nearest_scale

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Any:
        raise AssertionError


def loss(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    error = weight.double() - (
        (codes.double() - 8).unflatten(-1, (scale.shape[-1], -1)) * scale.double()[..., None]
    ).flatten(-2)
    return float(((error @ hessian) * error).sum())


def quality(weight: Tensor, x: Tensor) -> dict[str, Any]:
    """One matrix (out, in) on inputs (tokens, in)."""
    weight = weight[None]
    hessian = moments([x])
    factor = ldlq_factor.factorize(hessian, DAMP, act_order=True)
    grid = SCHEME.grid(weight, factor.hessian.diagonal(dim1=-2, dim2=-1), points=POINTS, signed=True)
    codes = ldlq_sweep.sweep(grid, weight, factor)
    polished = ldlq_polish.polish(grid, weight, codes, factor.hessian, 2)
    with using(Backend.TORCH):
        twin = ldlq_sweep.sweep(grid, weight, factor)
        twin_polished = ldlq_polish.polish(grid, weight, twin, factor.hessian, 2)
    exact = x.double().T @ x.double() / len(x)
    undamped = exact.clone()[None]
    oracle = ldlq_factor.factorize(exact[None], DAMP, act_order=True)
    with patch("quantkit.schemes.affine_int._FIT_GROUPS", 2**16):
        importance = oracle.hessian.diagonal(dim1=-2, dim2=-1)
        scale, _ = SCHEME.fit(weight.double(), importance, grid=POINTS, signed=True)
    best = ldlq_sweep.sweep(Exact(scale.double()), weight.double(), oracle)
    of_oracle = loss(weight, best, scale, oracle.hessian)
    of_oracle_undamped = loss(weight, best, scale, undamped)
    nearest = SCHEME.encode(weight, grid.stored_scale)
    return {
        "tokens": len(x),
        "damping raised": factor.damping,
        "loss / oracle": loss(weight, codes, grid.scale, oracle.hessian) / of_oracle,
        "undamped loss / oracle": loss(weight, codes, grid.scale, undamped) / of_oracle_undamped,
        "twin's loss / oracle": loss(weight, twin, grid.scale, oracle.hessian) / of_oracle,
        "polished loss / oracle": loss(weight, polished.codes, polished.scale, oracle.hessian) / of_oracle,
        "twin's polished loss / oracle": loss(weight, twin_polished.codes, twin_polished.scale, oracle.hessian)
        / of_oracle,
        "round to nearest / oracle": loss(weight, nearest, grid.scale, oracle.hessian) / of_oracle,
        "codes that differ from the twin's": float((codes != twin).float().mean()),
        "scales that differ from the oracle's": float((grid.scale != scale.float()).float().mean()),
        "claimed polished loss / its loss": float(polished.loss.sum())
        / loss(weight, polished.codes, polished.scale, factor.hessian.double()),
    }


def machine() -> dict[str, Any]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else platform.processor() or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": of("triton"),
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--polish", type=int, default=2, help="rounds of the run with polish")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gptq_expert.json")
    arguments = parser.parse_args()
    scale = arguments.scale
    sizes = Sizes(7168 // scale // 128 * 128, max(128, 2048 // scale), arguments.tokens // scale, arguments.experts)
    result: dict[str, Any] = {"what": __doc__.splitlines()[0], **machine(), "sizes": vars(sizes)}
    x = [structured_inputs(sizes, sizes.tokens, seed) for seed in range(sizes.experts)]
    gate_up = torch.stack([structured_weight(2 * sizes.inter, sizes.hidden, 100 + e) for e in range(sizes.experts)])
    down = torch.stack([structured_weight(sizes.hidden, sizes.inter, 200 + e) for e in range(sizes.experts)])
    runs = {
        "gptq": Run(0),
        f"gptq, {arguments.polish} rounds of polish": Run(arguments.polish),
        f"gptq, cross term of gate and up, {arguments.polish} rounds of polish": Run(
            arguments.polish, [tokens + 0.02 * torch.randn_like(tokens) for tokens in x]
        ),
    }
    for name, run in runs.items():
        experts_once(Clock(), gate_up, down, x, run)  # compiles the kernels
        clock = Clock()
        before = 0
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(arguments.repeats):
            experts_once(clock, gate_up, down, x, run)
        stages = clock.medians_ms(sizes.experts)
        counted = {stage: ms for stage, ms in stages.items() if stage != "hidden"}
        result[name] = {
            "ms an expert": round(sum(counted.values()), 3),
            "ms an expert by stage": stages,
            "not counted": ["hidden"],
            "GPU-hours for 14848 experts": round(sum(counted.values()) * 14848 / 3.6e6, 4),
            "peak bytes beside inputs and weights": torch.cuda.max_memory_allocated() - before
            if DEVICE.type == "cuda"
            else None,
        }
        print(name, json.dumps(result[name], indent=1), flush=True)
    write(result, arguments.out)
    if not arguments.no_quality:
        runs.clear()
        gate_up, down, few = gate_up[0].clone(), down[0].clone(), sizes.tokens // 8
        hidden = both(gate_up.bfloat16(), x[0])
        x = x[:1]
        cases = {
            "gate": (gate_up[: sizes.inter], x[0]),
            f"gate, {few} tokens": (gate_up[: sizes.inter], x[0][:few]),
            "down": (down, hidden),
            f"down, {few // 2} tokens": (down, hidden[: few // 2]),
        }
        result["quality"] = {}
        for case, (weight, inputs) in cases.items():
            result["quality"][case] = quality(weight, inputs)
            print(case, json.dumps(result["quality"][case], indent=1), flush=True)
            write(result, arguments.out)


def write(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
