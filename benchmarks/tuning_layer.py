"""Tuning of one real MoE layer of DeepSeek V3 on one GPU, with the code that `quantkit convert` runs: seconds, memory.

    python benchmarks/tuning_layer.py [--tokens 131072] [--epochs 8] [--experts 256] [--group 12] [--profile] [--store]

All linears are int4 in groups of 128 (random weights, rounded to nearest); scales, norms and codes are tuned, 4,096
tokens an update. The target is the original layer's output. Fewer --epochs or --tokens give seconds of an update and of
a held-out pass, which are added up for the whole. --group: experts that are decoded together. --scale 8 divides the
sizes, to try the script anywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gptq_expert import machine
from moe_layer import layer_config
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.arch.base import ExpertBlock, ModelArch
from quantkit.calibrate.hidden_states import MemoryRows
from quantkit.calibrate.stream import forward_layer
from quantkit.plan.tune import Tune
from quantkit.schemes import IntScheme
from quantkit.tensors import Role
from quantkit.tuning.experts import TunedExperts, groups_of
from quantkit.tuning.layer import TunedLayer, TunedNorm
from quantkit.tuning.linears import Matrices, TunedMatrices
from quantkit.tuning.tune import TuneTask, split_rows, step_rows, tune

RESULTS = Path(__file__).resolve().parent / "results" / "tuning_layer.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NARROW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SCHEME = IntScheme(bits=4, group_size=128)
BATCH = 8
"""Experts that are quantised together."""


@dataclass
class Clock:
    """Seconds of updates, and of everything between the last update of an epoch and the next one."""

    updates: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    last: float = 0.0
    per_epoch: int = 0

    def start(self, per_epoch: int) -> None:
        self.per_epoch, self.last = per_epoch, now()

    def __call__(self, done: int, total: int) -> None:
        moment = now()
        first = done % self.per_epoch == 1 or self.per_epoch == 1
        (self.passes if first else self.updates).append(moment - self.last)
        self.last = moment


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def random_weights(arch: ModelArch) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    made: dict[str, Tensor] = {}
    for spec in arch.tensors():
        if spec.layer != 0:
            continue
        if len(spec.shape) == 1:
            fill = torch.zeros if spec.role is Role.ROUTER else torch.ones
            made[spec.name] = fill(spec.shape, device=DEVICE, dtype=torch.float32 if spec.float32 else NARROW)
        else:
            noise = torch.randn(spec.shape, generator=generator, device=DEVICE, dtype=NARROW)
            made[spec.name] = noise.mul_(spec.shape[-1] ** -0.5)
    return made


def rounded(weights: dict[str, Tensor], names: tuple[str, ...]) -> TunedMatrices:
    whole = torch.stack([weights[name] for name in names])
    stored = SCHEME.rounded(whole.float(), None, points=0, signed=False)
    return TunedMatrices(SCHEME.tunable(stored), whole.__getitem__, NARROW, adam=False)


def tuned_layer(arch: ModelArch, weights: dict[str, Tensor], at_once: int) -> TunedLayer:
    sublayers = arch.sublayers(0)
    (block,) = (b for sublayer in sublayers for b in sublayer if isinstance(b, ExpertBlock))
    dense = {s.name: (rounded(weights, (s.name,)), s.shape) for s in arch.tensors() if s.linear and s.layer == 0
             and s.expert is None}  # fmt: skip
    placed: dict[str, tuple[Matrices, int]] = {}
    moving = [matrices for matrices, _ in dense.values()]
    for names in (block.gates, block.ups, block.downs):
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            moving.append(rounded(weights, batch))
            placed.update((name, (moving[-1], place)) for place, name in enumerate(batch))
    projections = (block.gates, block.ups, block.downs)
    groups = groups_of(lambda e: tuple(placed[names[e]] for names in projections), block.n_experts, at_once)
    norms = {s.name: TunedNorm(weights[s.name], NARROW) for s in arch.tensors() if s.role is Role.NORM and s.layer == 0}
    others = {s.name: weights[s.name] for s in arch.tensors() if s.layer == 0 and not s.linear}
    experts = {block.name: TunedExperts(block.activate, groups, NARROW)}
    return TunedLayer(sublayers, dense, {}, {}, norms, experts, tuple(moving), others.__getitem__)


def task_of(arch: ModelArch, arguments: argparse.Namespace) -> TuneTask:
    length = arguments.length
    x = MemoryRows(arguments.tokens // length, length, arch.hidden_size, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for row in range(x.n_rows):
        x.write(row, torch.randn(1, length, arch.hidden_size, generator=generator, device=DEVICE))
    target = MemoryRows(x.n_rows, length, x.width, DEVICE)
    target.write(0, x.read(0, x.n_rows))
    weights = random_weights(arch)
    scratch = MemoryRows(x.n_rows, length, x.width, DEVICE, NARROW)
    forward_layer(arch.sublayers(0), weights.__getitem__, target, scratch, DEVICE)
    scratch.close()
    layer = tuned_layer(arch, weights, arguments.group)
    return TuneTask(layer, x, target, None, Tune(epochs=arguments.epochs), 0, DEVICE)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = layer_config(arguments.scale)
    if arguments.experts:
        config["n_routed_experts"] = arguments.experts
    start = now()
    task = task_of(arch_of(config), arguments)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    made, clock = now() - start, Clock()
    _, taught = split_rows(task.x.n_rows)
    per_epoch = max(1, len(taught) // step_rows(task.settings, task.x.length))
    clock.start(per_epoch)
    start = now()
    outcome = tune(task, clock)
    seconds = now() - start
    update, held = (statistics.median(values or [0.0]) for values in (clock.updates, clock.passes))
    return {
        "tokens": arguments.tokens,
        "epochs": arguments.epochs,
        "experts": config["n_routed_experts"],
        "hidden": config["hidden_size"],
        "group": arguments.group,
        "seconds": round(seconds, 2),
        "update_s": round(update, 4),
        "held_out_s": round(max(0.0, held - update), 3),
        "updates": len(clock.updates) + len(clock.passes),
        "preparing_s": round(made, 1),
        "loss": [round(outcome.before, 6), round(outcome.after, 6), outcome.epoch],
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if DEVICE.type == "cuda" else None,
    }


def profiled(arguments: argparse.Namespace) -> str:
    """Seconds of kernels and functions, one epoch of few tokens."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    config = layer_config(arguments.scale)
    task = task_of(arch_of(config), arguments)
    with profile(activities=kinds) as found:
        tune(task, lambda done, total: None)
    key = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)


def store(row: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps({**machine(), "rows": [row]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--experts", type=int, default=0, help="0: as the model has")
    parser.add_argument("--group", type=int, default=12)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where the time goes in place of a result")
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    if arguments.profile:
        print(profiled(arguments))
        return
    row = measure(arguments)
    print(json.dumps(row), flush=True)
    if arguments.store:
        store(row)


if __name__ == "__main__":
    main()
