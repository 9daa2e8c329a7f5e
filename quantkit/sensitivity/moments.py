"""Sums over tokens of what `output_gradients` gives: second moments of gradients, whole or by heads, and the scalar
Fisher information of a linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.calibrate.stream import row_batches
from quantkit.kernels.backend import Backend, narrow_product
from quantkit.plan.output_memory import BY_HEADS
from quantkit.sensitivity.output_gradients import Named

if TYPE_CHECKING:
    from quantkit.arch.base import ModelArch
    from quantkit.calibrate.hidden_states import RowStore


class OutputMoments:
    """Sum of g g^T over the tokens of one linear, or of as many diagonal blocks of it: ``sums`` (blocks, out / blocks,
    out / blocks) float32. ``n_tokens``: how many were added.

    On a GPU with kernels the factors are rounded to bfloat16, as those of input moments are.
    """

    def __init__(self, out_features: int, blocks: int = 1, *, device: torch.device) -> None:
        """Raises ValueError if the rows cannot be cut so."""
        if blocks < 1 or out_features % blocks:
            raise ValueError(f"{out_features} rows cannot be cut into {blocks} equal blocks")
        self.n_tokens = 0
        self.sums = torch.zeros(blocks, out_features // blocks, out_features // blocks, device=device)

    def add(self, gradients: Tensor) -> None:
        """gradients (n, out) of n more tokens, on the device of the sums."""
        self.n_tokens += len(gradients)
        if not len(gradients):
            return
        blocks = gradients.unflatten(1, (len(self.sums), -1)).transpose(0, 1)  # (blocks, n, out / blocks)
        if Backend.of(self.sums.device) is Backend.TRITON:
            self.sums += narrow_product(blocks.mT, blocks)
        else:
            blocks = blocks.float()
            self.sums.baddbmm_(blocks.mT, blocks)


def output_moments(gradients: Iterable[Named], blocks: Mapping[str, int] | None = None) -> dict[str, OutputMoments]:
    """The moments of each linear that occurs, by name. ``blocks``: linear -> diagonal blocks (see `head_blocks`), one
    for those it does not name."""
    found: dict[str, OutputMoments] = {}
    for name, values in gradients:
        if name not in found:
            count = (blocks or {}).get(name, 1)
            found[name] = OutputMoments(values.shape[1], count, device=values.device)
        found[name].add(values)
    return found


def head_blocks(arch: ModelArch) -> dict[str, int]:
    """Linears whose rows belong to heads -> the number of heads: q_b and kv_b of DeepSeek V3 have 24,576 and 32,768
    rows, whose moments as a whole would take 2.4 and 4.3 GB, and by heads 19 and 34 MB."""
    heads = arch.serving().heads
    return {spec.name: heads for spec in arch.tensors() if spec.linear and spec.projection in BY_HEADS}


def output_metric(gradient: RowStore, device: torch.device) -> Tensor:
    """Sum of g g^T over all tokens of the gradient at a layer's output: (hidden, hidden) float32 on the device."""
    moments = OutputMoments(gradient.width, device=device)
    for start, stop in row_batches(gradient, device):
        moments.add(gradient.read(start, stop).to(device).flatten(0, 1))
    return moments.sums[0]


def fisher(gradients: Tensor) -> Tensor:
    """Sum over tokens of the mean over outputs of g^2: gradients (n, out) -> () float64, where they lie."""
    return gradients.float().square().mean(-1).sum(dtype=torch.float64)
