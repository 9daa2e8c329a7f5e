"""One real MoE layer of DeepSeek V3 in a Fisher pass, with the code that `quantkit sensitivity` runs: seconds forward
and backward, and the peak of memory.

    python benchmarks/fisher_layer.py [--tokens 32768] [--repeats 3] [--moments] [--out FILE]

The layer (256 experts of 7168 x 2048, attention of 128 heads, shared expert) has heavy-tailed random weights and a
router whose bias is balanced as DeepSeek balances it. Weights (bfloat16, 23 GB), hidden states and gradients lie on the
GPU: reading the checkpoint and writing the layer's file come on top. Forward: the residual stream through the layer.
Backward: its inside computed again, the gradient from the layer's output to its input, and the Fisher scalar of each
linear. `--moments`: also the sums of g g^T of the attention's linears, by heads where these are many, and of gate and
up of all experts, as a conversion would take them later. `--scale 16` divides the sizes, to try the script anywhere,
also without a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gptq_expert import DEVICE, Sizes, machine, structured_inputs, structured_weight, write
from moe_layer import layer_config
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.arch.base import DenseBlock, ExpertBlock, ModelArch
from quantkit.calibrate.hidden_states import MemoryRows, RowStore
from quantkit.sensitivity.backward import FisherSums, LayerPass
from quantkit.sensitivity.moments import OutputMoments, head_blocks, output_moments
from quantkit.sensitivity.output_gradients import ExpertGradients, dense_gradients

LENGTH = 2048
BF16 = DEVICE.type == "cuda"


def layer_weights(arch: ModelArch) -> dict[str, Tensor]:
    """Every tensor of layer 0 on the device, as a source of BF16 or FP8 gives it."""
    found: dict[str, Tensor] = {}
    for number, spec in enumerate(spec for spec in arch.tensors() if spec.layer == 0):
        if len(spec.shape) == 1:
            made = (torch.zeros if spec.float32 else torch.ones)(spec.shape, device=DEVICE)
        else:
            # Outputs as large as inputs: 0.02 times the square root of 7168 is 1.7.
            made = structured_weight(*spec.shape, number) * (0.6 * (7168 / spec.shape[1]) ** 0.5)
        found[spec.name] = made.bfloat16() if BF16 and not spec.float32 else made
    return found


def balance(block: ExpertBlock, weights: dict[str, Tensor], x: RowStore) -> None:
    """Move the router's bias until experts get about equally many of some tokens (arXiv 2408.15664)."""
    bias = next(name for name in weights if name.endswith("e_score_correction_bias"))
    h = block.inputs(weights.__getitem__, x.read(0, min(8, x.n_rows)))
    step = 0.02
    for _ in range(200):
        counts = block.route(weights.__getitem__, h).indices.flatten().bincount(minlength=block.n_experts).float()
        weights[bias] -= step * (counts - counts.mean()).sign()
        step *= 0.98


class Layer:
    """The layer with its hidden states and gradient. ``x`` stays, the others are overwritten."""

    def __init__(self, config: dict[str, Any], tokens: int) -> None:
        self.arch = arch_of(config)
        self.sublayers = self.arch.sublayers(0)
        self.weights = layer_weights(self.arch)
        self.n_rows, self.length = max(1, tokens // LENGTH), min(LENGTH, tokens)
        self.x = self.new_rows()
        sizes = Sizes(self.arch.hidden_size, 0, tokens, 0)
        for row in range(self.n_rows):
            self.x.write(row, structured_inputs(sizes, self.length, row))
        (self.experts,) = (b for sublayer in self.sublayers for b in sublayer if isinstance(b, ExpertBlock))
        balance(self.experts, self.weights, self.x)
        self.own = LayerPass(self.weights.__getitem__, self.new_rows, DEVICE)

    def new_rows(self) -> RowStore:
        """A store for all tokens."""
        return MemoryRows(self.n_rows, self.length, self.arch.hidden_size, DEVICE)

    def gradient(self) -> RowStore:
        """At the layer's output: of some size, no more is needed."""
        store = self.new_rows()
        for row in range(self.n_rows):
            generator = torch.Generator(DEVICE).manual_seed(row)
            store.write(row, 1e-3 * torch.randn(1, self.length, store.width, generator=generator, device=DEVICE))
        return store

    def copy(self) -> RowStore:
        """Of the stream before the layer."""
        store = self.new_rows()
        store.write(0, self.x.read(0, self.n_rows))
        return store

    def forward(self) -> None:
        """The stream through the layer."""
        self.own.forward(self.sublayers, self.copy())

    def backward(self) -> None:
        """The gradient through the layer, and all scalars."""
        gradient, sums = self.gradient(), FisherSums()
        for number in reversed(range(len(self.sublayers))):
            x = self.copy()
            self.own.forward(self.sublayers[:number], x)
            self.own.backward(self.sublayers[number], x, gradient, sums)
            x.close()
        values = sums.values()
        assert all(value >= 0 for _, value in values.values())
        assert bool(gradient.read(0, 1).isfinite().all())

    def moments(self) -> None:
        """Sums of g g^T: attention, then gate and up of all experts, eight at a time."""
        (attention,) = self.sublayers[0]
        assert isinstance(attention, DenseBlock)
        weights, gradient = self.weights.__getitem__, self.gradient()
        output_moments(dense_gradients(attention, weights, self.x, gradient, DEVICE), head_blocks(self.arch))
        experts = ExpertGradients.of(self.experts, weights, self.x, gradient, self.new_rows, DEVICE)
        for expert in range(self.experts.n_experts):
            sums = [OutputMoments(weights(self.experts.gates[0]).shape[0], device=DEVICE) for _ in range(2)]
            for part in experts.passes(expert):
                sums[0].add(part.gate)
                sums[1].add(part.up)


def timed(function: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Median seconds and the peak of GPU memory; the first run, which compiles, does not count."""
    seconds: list[float] = []
    for _ in range(repeats + 1):
        synchronise()
        if BF16:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        function()
        synchronise()
        seconds.append(time.perf_counter() - start)
    found = sorted(seconds[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if BF16 else None
    return {
        "seconds": round(found[len(found) // 2], 3),
        "all seconds": [round(one, 3) for one in seconds[1:]],
        "peak GiB of GPU memory, weights included": None if peak is None else round(peak, 2),
    }


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if BF16:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--moments", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    layer = Layer(layer_config(arguments.scale), arguments.tokens)
    synchronise()
    print(f"prepared in {time.perf_counter() - start:.0f} s", flush=True)
    result: dict[str, Any] = {"what": __doc__.splitlines()[0], **machine(), "tokens": arguments.tokens}
    cases = {"forward": layer.forward, "backward": layer.backward}
    if arguments.moments:
        cases["moments of output gradients"] = layer.moments
    for name, function in cases.items():
        result[name] = timed(function, arguments.repeats)
        print(name, json.dumps(result[name]), flush=True)
    result["forward and backward, seconds"] = round(result["forward"]["seconds"] + result["backward"]["seconds"], 3)
    print("forward and backward:", result["forward and backward, seconds"], "s", flush=True)
    if arguments.out is not None:
        write(result, arguments.out)


if __name__ == "__main__":
    main()
