"""A whole layer while it is tuned: its forward pass inside autograd, on some rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, LinearPart, Sublayer
from quantkit.arch.ops import linear
from quantkit.tuning.adam import Adam
from quantkit.tuning.experts import TunedExperts
from quantkit.tuning.linears import TunedMatrices

if TYPE_CHECKING:
    from quantkit.arch.base import Weights


class TunedNorm:
    """A norm's weight (n,), which moves relative to where it began. ``stored``: the dtype in which it will lie."""

    def __init__(self, weight: Tensor, stored: torch.dtype) -> None:
        self._start, self._stored, self._computed = weight.float(), stored, weight.dtype
        self.change = torch.zeros_like(self._start, requires_grad=True)
        self._best: Tensor | None = None

    def value(self) -> Tensor:
        """As it would be stored; gradients pass the rounding."""
        wanted = self._start * (1 + self.change)
        rounded = wanted.detach().to(self._stored).float()
        return (wanted + (rounded - wanted.detach())).to(self._computed)

    def keep(self) -> None:
        """Remember this state as the best."""
        self._best = self.change.detach().clone()

    def restore(self) -> None:
        """Go back to the best state."""
        assert self._best is not None, "no state was kept"
        with torch.no_grad():
            self.change.copy_(self._best)


@dataclass(frozen=True, slots=True)
class TunedLayer:
    """Everything that computes. ``dense``: linears and parts that were quantised, by name, each with the shape of the
    linear or part; ``experts``: by name of the block; ``moving``: all matrices that move; ``others``: weights that
    stay."""

    sublayers: tuple[Sublayer, ...]
    dense: Mapping[str, tuple[TunedMatrices, tuple[int, ...]]]
    fixed: Mapping[str, Tensor]
    parts: Mapping[str, LinearPart]
    norms: Mapping[str, TunedNorm]
    experts: Mapping[str, TunedExperts]
    moving: tuple[TunedMatrices, ...]
    others: Callable[[str], Tensor]

    def optimizer(self) -> Adam:
        """Of scales and norms."""
        scales = (one for each in self.moving for one in each.changes)
        return Adam([*scales, *(one.change for one in self.norms.values())])

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """x (rows, tokens, hidden) -> the layer's output, the residual included."""
        for sublayer in self.sublayers:
            added = torch.zeros_like(x)
            for block in sublayer:
                if isinstance(block, DenseBlock):
                    (inputs,) = block.stages[-1].inputs(weights, x)
                    own = linear(inputs, weights(block.output))
                else:
                    h = block.inputs(weights, x)
                    routing = block.route(weights, h)
                    own = self.experts[block.name](h, routing.weights, routing.indices)
                added = added + own.view(x.shape)
            x = x + added
        return x

    def step_weights(self) -> StepWeights:
        """The weights of one pass."""
        return StepWeights(self)

    def keep(self) -> None:
        """Remember this state as the best."""
        for one in (*self.moving, *self.norms.values()):
            one.keep()

    def restore(self) -> None:
        """Go back to the best state."""
        for one in (*self.moving, *self.norms.values()):
            one.restore()


class StepWeights:
    """Weights by name for one forward pass, decoded once; `take` hands their gradients on after the backward."""

    def __init__(self, layer: TunedLayer) -> None:
        self._layer = layer
        self._known: dict[str, Tensor] = {}
        self._leaves: list[tuple[TunedMatrices, Tensor]] = []
        self._parts_of: dict[str, list[LinearPart]] = {}
        for part in layer.parts.values():
            if part.name in layer.dense or part.name in layer.fixed:
                self._parts_of.setdefault(part.whole, []).append(part)

    def __call__(self, name: str) -> Tensor:
        """The weight, in autograd's graph if it moves."""
        if name not in self._known:
            self._known[name] = self._made(name)
        return self._known[name]

    def take(self) -> None:
        """Move the codes of dense linears."""
        for matrices, leaf in self._leaves:
            if leaf.grad is not None:
                matrices.take(slice(None), leaf.grad)

    def _made(self, name: str) -> Tensor:
        layer = self._layer
        if name in layer.norms:
            return layer.norms[name].value()
        if name in layer.dense:
            return self._leaf(name)
        if name in layer.fixed:
            return layer.fixed[name]
        whole = layer.others(name)
        for number, part in enumerate(self._parts_of.get(name, ())):
            whole = whole if number else whole.clone()
            own = self._leaf(part.name) if part.name in layer.dense else layer.fixed[part.name]
            part.put(whole, own.view(part.shape))
        return whole

    def _leaf(self, name: str) -> Tensor:
        matrices, shape = self._layer.dense[name]
        leaf = matrices.weight(slice(None))
        if torch.is_grad_enabled():
            leaf.requires_grad_()
            self._leaves.append((matrices, leaf))
        return leaf.view(shape)


def finish_update(layer: TunedLayer, weights: StepWeights) -> None:
    """After the loss's backward: gradients of all scales are complete."""
    weights.take()
    for one in layer.moving:
        one.finish()


def begin_update(moving: Iterable[TunedMatrices], step: float) -> None:
    """Before the forward pass of an update: codes will move at most by ``step``."""
    for one in moving:
        one.begin(step)
