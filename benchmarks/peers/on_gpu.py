"""gptqmodel's and llm-compressor's own GPTQ functions on matrices that are handed over: how long, how good.

    pip install gptqmodel==7.7.0 llmcompressor==0.14.0.1      # on the machine with the GPU
    python benchmarks/peers/on_gpu.py [--scale 8]             # times both on random matrices

`peers_on_gpu` is what benchmarks/moe_layer.py calls, `settings` what benchmarks/held_out.py does. Where the packages
cannot be installed, PEERS_PATH names a folder that holds their Python sources (README.md says how to fill it); their
heavy __init__ files are then left out. The functions that do the work are the packages' own in both cases, unchanged.

Times are by the host's clock between synchronisations, the median of three or more after a warm-up (one where it takes
seconds), all products in IEEE float32 (both peers want it so). gptqmodel: gate accumulates the Hessian, up adopts a
copy and shares the factor, as its own loop does for DeepSeek V3. llm-compressor: a batch of modules of one shape,
observer and stacking included, divided by the size of the batch. Peak memory is that of the whole call, beyond what its
inputs took.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

GROUP_SIZE = 128
BITS = 4
TIMED = (
    "gptqmodel default",
    "gptqmodel desc_act mse damp .1",
    "llm-compressor default",
    "llm-compressor mse damp .1",
)
"""The settings that are timed unless others are named: each peer's fastest and one of its best quality."""
SLOW_SECONDS = 2.5
"""A setting whose first repeat takes longer is measured once; the row says so."""
BATCHES = (15, 64)
"""llm-compressor's fastest numbers of modules on an H100: of gate's and up's shape, of down's. (From 16 on it takes
batched Cholesky, which is slower at 7168.)"""

_WITHOUT_INIT = {
    "gptqmodel": ("gptqmodel", "gptqmodel.looper", "gptqmodel.models", "gptqmodel.quantization"),
    "llmcompressor": (
        "llmcompressor",
        "llmcompressor.modifiers",
        "llmcompressor.modifiers.gptq",
        "llmcompressor.modifiers.utils",
        "llmcompressor.observers",
        "llmcompressor.utils",
    ),
}


# Getting at the packages


def _package(name: str) -> None:
    """Make `import name.module` work, with the package's own __init__ or, for a folder of sources, without."""
    bundle = os.environ.get("PEERS_PATH")
    if name in sys.modules:
        return
    if bundle is None:
        importlib.import_module(name)
        return
    root = Path(bundle).resolve()
    if not (root / name).is_dir():
        raise ModuleNotFoundError(f"PEERS_PATH={bundle} holds no folder {name}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    for part in _WITHOUT_INIT[name]:
        module = ModuleType(part)
        module.__path__ = [str(root / part.replace(".", "/"))]
        sys.modules[part] = module
        parent, _, child = part.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    if name == "gptqmodel":
        sys.modules["gptqmodel"].DEBUG_ON = False  # pyright: ignore[reportAttributeAccessIssue]
        _regular_expressions()
        config = importlib.import_module("gptqmodel.quantization.config")
        sys.modules["gptqmodel.quantization"].QuantizeConfig = config.QuantizeConfig  # pyright: ignore[reportAttributeAccessIssue]


def _regular_expressions() -> None:
    """Python's own in place of `pcre`, a compiled package that gptqmodel parses names and logs with."""
    try:
        importlib.import_module("pcre")
    except ModuleNotFoundError:
        stand_in = ModuleType("pcre")
        vars(stand_in).update({name: getattr(re, name) for name in re.__all__}, Flag=re.RegexFlag)
        sys.modules["pcre"] = stand_in


def _version(package: str) -> str:
    """From the package's own metadata (dist-info), which the folder of PEERS_PATH holds too."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "unknown"


# One setting of one peer: (weight, mean of x x^T, tokens) -> quantised weight


class Setting(Protocol):
    """A peer with its options."""

    @property
    def peer(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def setting(self) -> str: ...

    def quantise(self, weight: Tensor, hessian: Tensor, tokens: int) -> Tensor:
        """weight (out, in) float32, hessian (in, in) float32: mean of x x^T over so many tokens (neither is changed)
        -> weight as it is served, float32."""
        ...

    def measured(self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, hidden: Tensor, repeats: int) -> Times: ...


@dataclass
class Times:
    """Milliseconds of each repeat; weights: (gate, up, down) quantised."""

    gate: list[float] = field(default_factory=list)
    up: list[float] = field(default_factory=list)
    down: list[float] = field(default_factory=list)
    hessian: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    weights: tuple[Tensor, Tensor, Tensor] | None = None


def _warm_then(times: Times, repeats: int) -> Iterator[Times]:
    """Where each repeat writes: once elsewhere, then to ``times``."""
    yield Times()
    start = time.perf_counter()
    yield times
    if time.perf_counter() - start < SLOW_SECONDS:
        for _ in range(repeats - 1):
            yield times


class _Clock:
    """Milliseconds since it was made or last read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.read()

    def read(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed, self.start = 1e3 * (now - getattr(self, "start", now)), now
        return passed


@contextmanager
def _peak_of(times: Times, device: torch.device) -> Iterator[None]:
    """The most memory allocated inside, beyond what was there before."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    times.peak_bytes = max(times.peak_bytes, torch.cuda.max_memory_allocated(device) - before)


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@dataclass(frozen=True)
class GptqModel:
    """gptqmodel's `GPTQ` task. ``options`` go to its `QuantizeConfig`."""

    name: str
    options: dict[str, Any]

    peer = "gptqmodel"

    def __post_init__(self) -> None:
        _package("gptqmodel")

    @property
    def version(self) -> str:
        return _version("gptqmodel")

    @property
    def setting(self) -> str:
        fused = torch.cuda.is_available() and self._block_kernel()
        return f"{self.name}, {'its CUDA kernel' if fused else 'eager loop'}"

    @staticmethod
    def _block_kernel() -> bool:
        return bool(importlib.import_module("gptqmodel.quantization.gptq_cuda").block_update_available())

    def _task(self, weight: Tensor) -> Any:
        config = importlib.import_module("gptqmodel.quantization.config").QuantizeConfig
        gptq = importlib.import_module("gptqmodel.quantization.gptq").GPTQ
        options = {"bits": BITS, "group_size": GROUP_SIZE, "sym": True, "offload_to_disk": False, **self.options}
        task = gptq(_linear(weight), config(**options))
        task.quantizer.configure(perchannel=True)
        return task

    def _task_with(self, weight: Tensor, hessian: Tensor, tokens: int) -> Any:
        """A task that has seen all of its tokens; ``hessian``: its own, of 2 x x^T, which it takes over."""
        task = self._task(weight)
        task.H, task.nsamples, task.fwd_counter = hessian, tokens, 1
        return task

    def quantise(self, weight: Tensor, hessian: Tensor, tokens: int) -> Tensor:
        return self._task_with(weight, 2 * hessian, tokens).quantize()[0].float()

    @staticmethod
    def _accumulated(task: Any, x: Tensor) -> Tensor:
        task.add_batch(x, None)
        task.materialize_global_hessian()
        return task.H

    def _gate_and_up(self, gate: Tensor, up: Tensor, hessian: Tensor, tokens: int) -> tuple[list[Tensor], list[float]]:
        module = importlib.import_module("gptqmodel.quantization.gptq")
        leader, follower = self._task_with(gate, hessian, tokens), self._task(up)
        clock = _Clock(gate.device)
        follower.adopt_hessian_from(leader)
        cache = module.SharedHessianFactorCache(0, "gate", leader="gate")
        leader.attach_shared_hessian_cache(cache)
        follower.attach_shared_hessian_cache(cache)
        adopted = clock.read()
        gate_quantised = leader.quantize()[0]
        gate_ms = clock.read()
        up_quantised = follower.quantize()[0]
        return [gate_quantised, up_quantised], [gate_ms, adopted + clock.read()]

    def measured(self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, hidden: Tensor, repeats: int) -> Times:
        times, device = Times(), gate.device
        wide, narrow = self._accumulated(self._task(gate), x), self._accumulated(self._task(down), hidden)
        for found in _warm_then(times, repeats):
            copy = wide.clone()  # which the leader uses up
            with _peak_of(times, device):
                _, (gate_ms, up_ms) = self._gate_and_up(gate, up, copy, len(x))
            del copy
            task = self._task_with(down, narrow.clone(), len(hidden))
            clock = _Clock(device)
            with _peak_of(times, device):
                task.quantize()
            found.down.append(clock.read())
            found.gate.append(gate_ms)
            found.up.append(up_ms)
            tasks = self._task(gate), self._task(down)
            clock.read()
            self._accumulated(tasks[0], x)
            self._accumulated(tasks[1], hidden)
            found.hessian.append(clock.read())
            del tasks
        (gate_quantised, up_quantised), _ = self._gate_and_up(gate.float(), up.float(), wide, len(x))
        times.weights = (gate_quantised, up_quantised, self.quantise(down.float(), narrow / 2, len(hidden)))
        return times


@dataclass(frozen=True)
class LlmCompressor:
    """llm-compressor's `quantize_weight` with its observers, static activation order."""

    name: str
    observer: str = "memoryless_minmax"
    damp: float = 0.01
    batches: tuple[int, int] = BATCHES

    peer = "llm-compressor"

    def __post_init__(self) -> None:
        _package("llmcompressor")
        for observer in ("min_max", "mse", "imatrix"):
            importlib.import_module(f"llmcompressor.observers.{observer}")

    @property
    def version(self) -> str:
        return f"{_version('llmcompressor')}, compressed-tensors {_version('compressed-tensors')}"

    @property
    def setting(self) -> str:
        triton = torch.cuda.is_available() and importlib.import_module("compressed_tensors.utils.triton").HAS_TRITON
        return f"{self.name}, {'its Triton kernel' if triton else 'eager loop'}, batches of {self.batches}"

    def _arguments(self) -> Any:
        quantization = importlib.import_module("compressed_tensors.quantization")
        return quantization.QuantizationArgs(
            num_bits=BITS,
            type="int",
            symmetric=True,
            strategy="group",
            group_size=GROUP_SIZE,
            actorder="static",
            observer=self.observer,
        )

    def _scales(self, weight: Tensor, hessian: Tensor) -> dict[str, Any]:
        """``hessian``: sum of 2 x x^T; only its diagonal is looked at, by the imatrix observer, in any unit."""
        base = importlib.import_module("llmcompressor.observers.base")
        observer = base.Observer.load_from_registry(self.observer, base_name="weight", args=self._arguments())
        if self.observer == "imatrix_mse":
            observer._imatrix_sum = hessian.diagonal().clone()  # what its hook sums up
            observer._imatrix_count = torch.ones((), dtype=torch.int64, device=weight.device)
        observer(weight)
        return observer.get_qparams()

    def _batch(self, weights: Sequence[Tensor], hessians: list[Tensor]) -> Tensor:
        """(B, out, in) quantised; ``hessians`` (sums of 2 x x^T) are used up."""
        gptq = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
        helpers = importlib.import_module("llmcompressor.modifiers.gptq.helpers")
        modules = [_linear(weight) for weight in weights]
        with torch.no_grad():
            scales = [self._scales(weight, hessian) for weight, hessian in zip(weights, hessians, strict=True)]
            counts = {module: torch.ones((), device=weights[0].device) for module in modules}
            by_module = dict(zip(modules, hessians, strict=True))
            hessians.clear()
            stacked = helpers.prepare_batch(modules, scales, by_module, counts)
            quantised, _, given_up = gptq.quantize_weight(*stacked, self._arguments(), percdamp=self.damp)
        assert not given_up.any(), "llm-compressor gave up on a Hessian and rounded to nearest"
        return quantised

    def quantise(self, weight: Tensor, hessian: Tensor, tokens: int) -> Tensor:
        return self._batch([weight], [2 * tokens * hessian])[0].float()

    def _accumulated(self, weight: Tensor, x: Tensor) -> Tensor:
        helpers = importlib.import_module("llmcompressor.modifiers.gptq.helpers")
        module, count = _linear(weight), torch.zeros((), device=weight.device)
        return helpers.accumulate_hessian(x, module, helpers.make_empty_hessian(module), count)[0]

    def _batch_ms(self, times: Times, weights: Sequence[Tensor], hessian: Tensor, size: int) -> float:
        """Of one matrix, with the matrices repeated to a batch."""
        many = [weights[i % len(weights)] for i in range(size)]
        hessians = [hessian.clone() for _ in many]
        clock = _Clock(hessian.device)
        with _peak_of(times, hessian.device):
            self._batch(many, hessians)
        return clock.read() / size

    def measured(self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, hidden: Tensor, repeats: int) -> Times:
        times = Times()
        wide, narrow = self._accumulated(gate, x), self._accumulated(down, hidden)
        for found in _warm_then(times, repeats):
            each = self._batch_ms(times, [gate, up], wide, self.batches[0])
            found.gate.append(each)
            found.up.append(each)
            found.down.append(self._batch_ms(times, [down], narrow, self.batches[1]))
            clock = _Clock(gate.device)
            for weight, inputs in ((gate, x), (up, x), (down, hidden)):  # each module has its own
                self._accumulated(weight, inputs)
            found.hessian.append(clock.read())
        of_both = self._batch([gate.float(), up.float()], [wide.clone(), wide.clone()])
        times.weights = (of_both[0], of_both[1], self._batch([down.float()], [narrow])[0])
        return times


def settings(batches: tuple[int, int] = BATCHES) -> dict[str, Setting]:
    """What is compared: each peer's default and its settings of best quality."""
    ordered = {"desc_act": True, "act_group_aware": False, "mse": 2.4, "damp_percent": 0.1}
    static = "static order"
    return {
        "gptqmodel default": GptqModel("default (group-aware order, damp .05)", {}),
        "gptqmodel desc_act mse damp .1": GptqModel("desc_act, mse 2.4, damp .1", ordered),
        "gptqmodel desc_act static_groups mse damp .1": GptqModel(
            "desc_act, static_groups, mse 2.4, damp .1", {**ordered, "static_groups": True}
        ),
        "llm-compressor default": LlmCompressor(f"default ({static}, damp .01)", batches=batches),
        "llm-compressor mse damp .1": LlmCompressor(f"{static}, mse, damp .1", "memoryless_mse", 0.1, batches),
        "llm-compressor imatrix_mse damp .1": LlmCompressor(
            f"{static}, imatrix_mse, damp .1", "imatrix_mse", 0.1, batches
        ),
    }


@contextmanager
def _ieee_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peers_on_gpu(
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x: Tensor,
    hidden: Tensor,
    *,
    repeats: int = 3,
    batches: tuple[int, int] = BATCHES,
    names: Sequence[str] = TIMED,
) -> list[dict[str, Any]]:
    """Time the peers on one expert.

    gate, up (inter, d), down (d, inter), x (tokens, d): inputs of gate and up, hidden (tokens, inter): inputs of down,
    all bfloat16 on one device. ``names``: of `settings`. Each row: peer, version, setting; repeats; medians
    gate_ms, up_ms, down_ms, hessian_ms (what it accumulates for the three) and total_ms; peak_bytes; weights: (gate,
    up, down) float32, quantised by the same functions from float32 copies.
    """
    rows: list[dict[str, Any]] = []
    for setting in (settings(batches)[name] for name in names):
        with _ieee_float32():
            times = setting.measured(gate, up, down, x, hidden, repeats)
        parts = {f"{part}_ms": statistics.median(getattr(times, part)) for part in ("gate", "up", "down", "hessian")}
        rows.append(
            {
                "peer": setting.peer,
                "version": setting.version,
                "setting": setting.setting,
                "repeats": len(times.gate),
                **{part: round(ms, 3) for part, ms in parts.items()},
                "total_ms": round(sum(parts.values()), 3),
                "peak_bytes": times.peak_bytes,
                "weights": times.weights,
            }
        )
        if gate.is_cuda:
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divides all sizes")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--batches", type=int, nargs=2, default=BATCHES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=TIMED, help="names of settings")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    d, inter, tokens = (size // arguments.scale for size in (7168, 2048, arguments.tokens))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    gate, up, down = 0.02 * normal(inter, d), 0.02 * normal(inter, d), 0.02 * normal(d, inter)
    x, hidden = normal(tokens, d), normal(tokens, inter)
    for name in arguments.only:
        (row,) = peers_on_gpu(
            gate, up, down, x, hidden, repeats=arguments.repeats, batches=tuple(arguments.batches), names=[name]
        )
        del row["weights"]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
