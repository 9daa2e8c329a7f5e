"""Output Hessians of a sublayer's linears, from a Fisher pass over the original model (`quantkit.sensitivity`): sums of
g g^T over its tokens, g the gradient of the model's loss at a linear's outputs.

They are made when a sublayer's turn comes, of the routed experts when a batch's turn comes, with the weights that are
at hand then, and factored at once (`quantkit.quantizers.ldlq.two_sided`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, ExpertBlock, LinearPart
from quantkit.calibrate.stream import row_batches
from quantkit.quantizers.ldlq.two_sided import OutputFactor, factorize_output
from quantkit.sensitivity.moments import OutputMoments, output_moments
from quantkit.sensitivity.open import SublayerGradients
from quantkit.sensitivity.output_gradients import ExpertGradients

SHRINK = 16.0
"""Tokens for each output at which moments between outputs count half. Gradients are heavy-tailed: what few tokens say
of two outputs makes the rounding worse than knowing nothing."""


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """A Fisher pass as the work on one layer sees it. ``open``: number of a sublayer -> its gradients, until they are
    closed; ``heads``: linears whose rows belong to heads -> the number of heads, between which nothing is measured;
    ``parts``: of linears, by name."""

    open: Callable[[int], SublayerGradients]
    heads: Mapping[str, int]
    parts: Mapping[str, LinearPart]

    def sublayer(self, number: int) -> SublayerHessians:
        """That of sublayer ``number``, to be used in ``with``."""
        return SublayerHessians(self.open(number), self.heads, self.parts)


@dataclass(frozen=True, slots=True)
class SublayerHessians:
    """One sublayer. Use it in ``with``, which frees its gradients."""

    gradients: SublayerGradients
    heads: Mapping[str, int]
    parts: Mapping[str, LinearPart]

    def of_dense(self, block: DenseBlock, wanted: Collection[str]) -> dict[str, OutputFactor]:
        """By name, of each of the ``wanted`` linears and parts that is one, or rows of one. Others have none: an
        indexer's linears, keys that are stored transposed."""
        wholes = {self.parts[name].whole if name in self.parts else name for name in wanted}
        gradients = (named for named in self.gradients.dense(block) if named[0] in wholes)
        moments = {name: _shrunk(one) for name, one in output_moments(gradients, self.heads).items()}
        found: dict[str, Tensor] = {}
        for name in wanted:
            part = self.parts.get(name)
            own = moments.get(name) if part is None else _rows_of(part, moments.get(part.whole))
            if own is not None:
                found[name] = own.unsqueeze(0)
        # After parts have copied their rows: a Hessian becomes its factor.
        return {name: factorize_output(hessian) for name, hessian in found.items()}

    def of_experts(self, block: ExpertBlock) -> ExpertHessians:
        """Of the routed experts: who is routed where is found out here."""
        with ExitStack() as stack:
            experts = stack.enter_context(closing(self.gradients.experts(block)))
            found = ExpertHessians(experts, _of_all_downs(experts))
            stack.pop_all()
        return found

    def __enter__(self) -> SublayerHessians:
        return self

    def __exit__(self, *exception: object) -> None:
        self.gradients.__exit__(*exception)


@dataclass(frozen=True, slots=True)
class ExpertHessians:
    """Routed experts. ``down``: one for all of them, because all write to the residual stream (of DeepSeek V3 it has
    205 MB)."""

    gradients: ExpertGradients
    down: OutputFactor

    def of_gate_up(self, experts: tuple[int, ...], weights: Mapping[str, Tensor]) -> tuple[OutputFactor, OutputFactor]:
        """Of gate and of up of some experts, B = experts, n = 1. ``weights``: theirs, by name."""
        own = replace(self.gradients, weights=weights.__getitem__)
        gate, up = zip(*(_of_expert(own, expert) for expert in experts), strict=True)
        return factorize_output(torch.stack(gate)), factorize_output(torch.stack(up))

    def close(self) -> None:
        """Free what the experts read."""
        self.gradients.close()


def _of_expert(gradients: ExpertGradients, expert: int) -> tuple[Tensor, Tensor]:
    """(1, inter, inter) of gate and of up."""
    moments: list[OutputMoments] = []
    for part in gradients.passes(expert):
        moments = moments or [OutputMoments(part.gate.shape[1], device=gradients.device) for _ in range(2)]
        for sums, values in zip(moments, (part.gate, part.up), strict=True):
            sums.add(values)
    if not moments:  # no token of the Fisher pass
        inter = len(gradients.weights(gradients.block.gates[expert]))
        moments = [OutputMoments(inter, device=gradients.device) for _ in range(2)]
    gate, up = map(_shrunk, moments)
    return gate, up


def _of_all_downs(experts: ExpertGradients) -> OutputFactor:
    """Of (1, 1, hidden, hidden): sum over experts and their tokens of share^2 g g^T, g the gradient at the sublayer's
    output."""
    store, device = experts.gradient, experts.device
    squares = torch.zeros(store.n_rows * store.length, device=store.device)
    for expert in range(experts.block.n_experts):
        token, share = experts.tokens.of_expert(expert)
        squares.index_add_(0, token, share.square())
    moments = OutputMoments(store.width, device=device)
    for start, stop in row_batches(store, device):
        rows = store.read(start, stop).to(device).float().flatten(0, 1)
        own = squares[start * store.length : stop * store.length].sqrt().to(device)
        moments.add(rows * own.unsqueeze(1))
    return factorize_output(_shrunk(moments).unsqueeze(0))


def _shrunk(moments: OutputMoments) -> Tensor:
    """The sums (n, r, r), those between different outputs weakened: times tokens / (tokens + k), k = SHRINK * r."""
    sums, count = moments.sums, moments.n_tokens
    diagonal = sums.diagonal(dim1=-2, dim2=-1).clone()
    sums.mul_(count / (count + SHRINK * sums.shape[-1]))
    sums.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return sums


def _rows_of(part: LinearPart, whole: Tensor | None) -> Tensor | None:
    """(heads, rows, rows) of a part from those of its linear (n, r, r); None without these, and unless each head of the
    part is rows of one block."""
    if whole is None:
        return None
    n_blocks, height = whole.shape[:2]
    numbers = torch.arange(n_blocks * height).unsqueeze(1).expand(part.whole_shape)
    taken = part.take(numbers)  # which row of the linear each number comes from
    rows = taken[:, :, 0]
    if len(rows) != n_blocks or bool((taken != rows.unsqueeze(2)).any()):
        return None
    inside = (rows - height * torch.arange(n_blocks).unsqueeze(1)).to(whole.device)
    return torch.stack([one[places][:, places] for one, places in zip(whole, inside, strict=True)])
