"""Gradients of the loss with respect to the outputs of a sublayer's linears, from its input and the gradient at its
output: autograd inside one attention over some rows, or inside one expert.

A dense block is run as calibration runs it, while `LinearOutputs` notes where in autograd's graph the outputs of its
linears are; so a family need not say anything for it. Routed experts are taken one by one, by hand: an expert's output
is multiplied with its gate weight, and the rest of the layer is not in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quantkit.arch.base import DenseBlock, ExpertBlock
from quantkit.arch.ops import linear
from quantkit.calibrate.chunk_sizes import EXPERT_CHUNK, at_once
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import ExpertTokens, route_all, row_batches

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

Named = tuple[str, Tensor]
"""Name of a linear, and the gradients (n, out) of its outputs for n tokens, float32 or bfloat16."""


@dataclass(frozen=True, slots=True)
class _Output:
    """What one call computed: rows of ``name`` from ``first`` on, for some tokens."""

    name: str
    first: int
    edge: GradientEdge


class LinearOutputs(TorchFunctionMode):
    """While it is active, remembers the outputs of linears whose weights came from `weight`, whole or as runs of rows.

    Edges of the graph and not tensors: what is changed in place later (rotated queries) keeps the gradient of what the
    linear gave.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights
        self._known: dict[str, Tensor] = {}
        self.found: list[_Output] = []

    def weight(self, name: str) -> Tensor:
        """The weight, which is known from now on."""
        self._known[name] = tensor = self._weights(name)
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; note what it gave if it is a linear."""
        out = func(*args, **(kwargs or {}))
        if func is functional.linear and out.requires_grad:
            self._note(args[1], out)
        return out

    def _note(self, weight: Tensor, out: Tensor) -> None:
        for name, whole in self._known.items():
            start = weight.data_ptr() - whole.data_ptr()
            if whole.dtype == weight.dtype and 0 <= start < whole.nbytes:
                self.found.append(_Output(name, start // (whole.shape[-1] * whole.itemsize), get_gradient_edge(out)))

    def joined(self, gradients: Sequence[Tensor | None]) -> Iterator[Named]:
        """Gradients of what was found, in that order -> those of each whole linear, in the order of first calls."""
        parts: dict[str, dict[int, list[Tensor]]] = {}
        for output, gradient in zip(self.found, gradients, strict=True):
            if gradient is not None:
                flat = gradient.reshape(-1, gradient.shape[-1])
                parts.setdefault(output.name, {}).setdefault(output.first, []).append(flat)
        for name, runs in parts.items():
            # Rows of tokens follow one another in each run of the linear's rows.
            columns = [_joined(runs[first], 0) for first in sorted(runs)]
            yield name, _joined(columns, 1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def rows_gradients(
    blocks: Sequence[DenseBlock], weights: Weights, x: Tensor, gradient: Tensor
) -> tuple[Tensor, list[Named]]:
    """Some rows through the dense blocks of a sublayer and back. x, gradient (rows, tokens, hidden) float32: the
    sublayer's input, and the gradient at its output -> what the blocks add to the gradient at its input, of the same
    shape; the gradients of the outputs of their linears."""
    if not blocks:
        return torch.zeros_like(x), []
    x = x.detach().requires_grad_()
    outputs = LinearOutputs(weights)
    with torch.enable_grad(), outputs:
        added = [
            linear(block.stages[-1].inputs(outputs.weight, x)[0], outputs.weight(block.output)) for block in blocks
        ]
    given = [gradient.flatten(0, 1).to(own.dtype) for own in added]
    edges = [get_gradient_edge(x), *(output.edge for output in outputs.found)]
    own, *others = torch.autograd.grad(added, edges, given, allow_unused=True)
    return own, list(outputs.joined(others))


def dense_gradients(
    block: DenseBlock, weights: Weights, x: RowStore, gradient: RowStore, device: torch.device
) -> Iterator[Named]:
    """The gradients of the outputs of a dense block's linears, batch of rows by batch of rows: every linear comes once
    for each batch. ``x``: the sublayer's input, ``gradient``: at its output."""
    for start, stop in row_batches(x, device):
        rows, given = (store.read(start, stop).to(device).float() for store in (x, gradient))
        _, found = rows_gradients((block,), weights, rows, given)
        del rows, given
        yield from found


@dataclass(frozen=True, slots=True)
class ExpertPass:
    """Some tokens of one expert. gate, up (n, inter), down (n, hidden): gradients of the outputs of its linears;
    ``token`` (n,) int64; ``share`` (n,) float32: gradient of their gate weights; ``readers``: weights of gate and
    up."""

    token: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    share: Tensor
    readers: tuple[Tensor, Tensor]

    def into(self) -> Tensor:
        """The gradient at what the expert reads, (n, hidden)."""
        return self.gate @ self.readers[0] + self.up @ self.readers[1]


@dataclass(frozen=True, slots=True)
class ExpertGradients:
    """Gradients of the outputs of routed experts' linears, expert by expert. ``tokens``: of each; ``h``: what the block
    reads; ``gradient``: at the sublayer's output."""

    block: ExpertBlock
    weights: Weights
    tokens: ExpertTokens
    h: RowStore
    gradient: RowStore
    device: torch.device

    @classmethod
    def of(
        cls,
        block: ExpertBlock,
        weights: Weights,
        x: RowStore,
        gradient: RowStore,
        new_rows: Callable[[], RowStore],
        device: torch.device,
    ) -> ExpertGradients:
        """Route the tokens of the sublayer's input ``x``. ``new_rows``: makes a store of its shape; `close` frees
        it."""
        h = new_rows()
        tokens, _ = route_all(block, weights, x, h, device)
        return cls(block, weights, tokens, h, gradient, device)

    def named(self, expert: int) -> Iterator[Named]:
        """The gradients of gate, up and down of one expert, chunk of its tokens by chunk."""
        names = (self.block.gates[expert], self.block.ups[expert], self.block.downs[expert])
        for part in self.passes(expert):
            yield from zip(names, (part.gate, part.up, part.down), strict=True)

    def passes(self, expert: int) -> Iterator[ExpertPass]:
        """One expert's tokens through it and back; its weights are asked for once, and not for an expert without
        tokens."""
        if not self.tokens.count(expert):
            return
        names = (self.block.gates[expert], self.block.ups[expert], self.block.downs[expert])
        gate, up, down = map(self.weights, names)
        token, share = self.tokens.of_expert(expert)
        chunk = at_once(EXPERT_CHUNK, self.device)
        for part, factor in zip(token.split(chunk), share.split(chunk), strict=True):
            yield self._pass((gate, up, down), part, factor.to(self.device).unsqueeze(1))

    def _pass(self, expert: tuple[Tensor, Tensor, Tensor], token: Tensor, share: Tensor) -> ExpertPass:
        gate, up, down = expert
        own, given = self.h.gather(token).to(self.device), self.gradient.gather(token).to(self.device)
        outputs = [linear(own, weight).requires_grad_() for weight in (gate, up)]
        with torch.enable_grad():
            hidden = self.block.activate(*outputs)
        unweighted = given.to(down.dtype) @ down  # as if the gate weight were 1
        into_gate, into_up = torch.autograd.grad(hidden, outputs, (unweighted * share).to(hidden.dtype))
        of_share = (hidden.detach().float() * unweighted.float()).sum(-1)
        return ExpertPass(token, into_gate, into_up, given * share, of_share, (gate, up))

    def close(self) -> None:
        """Free the block's inputs."""
        self.h.close()
