"""The gradient of the residual stream on its way back through one decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, ExpertBlock, Sublayer
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import forward_layer, row_batches
from quantkit.sensitivity.moments import fisher
from quantkit.sensitivity.output_gradients import ExpertGradients, Named, rows_gradients

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

NewRows = Callable[[], RowStore]
"""Makes a store for one float32 vector of the residual stream's width for each token."""


@dataclass(slots=True)
class FisherSums:
    """Of each linear the tokens and the sum of `fisher`, which stays where it was computed until it is asked for."""

    tokens: dict[str, int] = field(default_factory=dict[str, int])
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def add(self, named: Named) -> None:
        """More tokens of a linear."""
        name, values = named
        self.tokens[name] = self.tokens.get(name, 0) + len(values)
        self.sums[name] = self.sums[name] + fisher(values) if name in self.sums else fisher(values)

    def values(self) -> dict[str, tuple[int, float]]:
        """Linear -> tokens and sum."""
        return {name: (count, float(self.sums[name])) for name, count in self.tokens.items()}


@dataclass(frozen=True, slots=True)
class LayerPass:
    """What going back through layers takes. ``weights``: of the original model; ``new_rows``: see `NewRows`."""

    weights: Weights
    new_rows: NewRows
    device: torch.device

    def forward(self, sublayers: tuple[Sublayer, ...], x: RowStore) -> None:
        """Carry ``x`` in place through some sublayers."""
        if sublayers:
            with closing(self.new_rows()) as scratch:
                forward_layer(sublayers, self.weights, x, scratch, self.device)

    def backward(self, sublayer: Sublayer, x: RowStore, gradient: RowStore, sums: FisherSums) -> None:
        """Carry ``gradient`` in place from a sublayer's output to its input ``x``; add up what its linears' outputs
        get."""
        dense = [block for block in sublayer if isinstance(block, DenseBlock)]
        with ExitStack() as stack:
            routed: list[tuple[ExpertBlock, RowStore, Tensor]] = []
            for block in sublayer:
                if isinstance(block, ExpertBlock):
                    into = stack.enter_context(closing(self.new_rows()))
                    routed.append((block, into, self._experts(block, x, gradient, into, sums)))
            for start, stop in row_batches(x, self.device):
                rows, given = (store.read(start, stop).to(self.device).float() for store in (x, gradient))
                added, found = rows_gradients(dense, self.weights, rows, given)
                for named in found:
                    sums.add(named)
                del found
                for block, into, shares in routed:
                    added = added + self._into_rows(block, rows, into.read(start, stop), shares[_span(x, start, stop)])
                gradient.write(start, given + added)

    def _experts(self, block: ExpertBlock, x: RowStore, gradient: RowStore, into: RowStore, sums: FisherSums) -> Tensor:
        """Add the gradient at what the block's experts read to ``into`` -> that of the gate weights (tokens, experts)
        float32 where the stream lies, 0 for experts that a token did not choose."""
        shares = torch.zeros(x.n_rows * x.length, block.n_experts, device=x.device)
        with closing(ExpertGradients.of(block, self.weights, x, gradient, self.new_rows, self.device)) as experts:
            for expert in range(block.n_experts):
                names = (block.gates[expert], block.ups[expert], block.downs[expert])
                for part in experts.passes(expert):
                    for named in zip(names, (part.gate, part.up, part.down), strict=True):
                        sums.add(named)
                    into.add(part.token, part.into(), torch.ones_like(part.share))
                    shares[part.token.to(x.device), expert] = part.share.to(x.device)
                if not experts.tokens.count(expert):
                    self._unseen(names, sums)
        return shares

    def _unseen(self, names: tuple[str, ...], sums: FisherSums) -> None:
        for name in names:
            sums.add((name, torch.zeros(0, 1, device=self.device)))

    def _into_rows(self, block: ExpertBlock, x: Tensor, into: Tensor, shares: Tensor) -> Tensor:
        """From what the experts read, and the gate weights, to the residual stream: through the router and the norm.
        x, into (rows, tokens, hidden), shares (rows * tokens, experts) -> as x."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            h = block.inputs(self.weights, leaf)
        read = h.detach().requires_grad_()
        with torch.enable_grad():
            routing = block.route(self.weights, read)
        given = shares.to(self.device).gather(1, routing.indices)
        (routed,) = torch.autograd.grad(routing.weights, read, given)
        whole = into.to(self.device).view(h.shape) + routed.float()
        (own,) = torch.autograd.grad(h, leaf, whole.to(h.dtype))
        return own


def _span(x: RowStore, start: int, stop: int) -> slice:
    return slice(start * x.length, stop * x.length)
