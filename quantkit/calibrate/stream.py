"""One stream of hidden states on its way through the model: the forward pass of a checkpoint that never fits in memory.

A layer's dense blocks run over batches of rows, its routed experts one after the other over the tokens that chose them,
so that one expert's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, ExpertBlock, Sublayer
from quantkit.arch.ops import linear
from quantkit.calibrate.chunk_sizes import BATCH_TOKENS, EXPERT_CHUNK, at_once, row_slices
from quantkit.calibrate.hidden_states import CPU, RowStore

if TYPE_CHECKING:
    from quantkit.arch.base import ModelArch, MtpLayer, Weights


def row_batches(
    store: RowStore, device: torch.device = CPU, rows: tuple[int, int] | None = None
) -> Iterator[tuple[int, int]]:
    """[start, stop) of each batch of rows that ``device`` computes at once, at least one row; of the rows [first, last)
    or of all."""
    first, last = rows or (0, store.n_rows)
    step = max(1, at_once(BATCH_TOKENS, device) // store.length)
    for start in range(first, last, step):
        yield start, min(start + step, last)


def sliced_batches(
    store: RowStore, device: torch.device, slices: Sequence[tuple[int, int]] | None = None
) -> Iterator[tuple[int, int]]:
    """`row_batches` of one slice of rows after the other: what a batch computes doesn't depend on who has the slice.
    ``slices``: those of the rank whose rows these are, by default of one that has all."""
    for rows in row_slices(store.n_rows) if slices is None else slices:
        yield from row_batches(store, device, rows)


def embed(embed_rows: Callable[[Tensor], Tensor], tokens: Tensor, store: RowStore) -> None:
    """Fill ``store`` with the embeddings of tokens (n_rows, length) int64. ``embed_rows``: ids (n,) -> (n, hidden)
    float32."""
    for start, stop in row_batches(store):
        store.write(start, _embedded(embed_rows, tokens[start:stop]))


def _embedded(embed_rows: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """(n_rows, length) -> (n_rows * length, hidden). Each token is read once."""
    ids, back = tokens.flatten().unique(return_inverse=True)
    return embed_rows(ids)[back]


@dataclass(frozen=True, slots=True)
class MtpEntrance:
    """What leads into an MTP layer: ``final_hidden`` of the model, or of the MTP layer before; ``embed_rows`` as for
    `embed`."""

    mtp: MtpLayer
    final_hidden: Callable[[Weights, Tensor], Tensor]
    weights: Weights
    embed_rows: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, arch: ModelArch, layer: int, weights: Weights, embed_rows: Callable[[Tensor], Tensor]) -> MtpEntrance:
        """The entrance of MTP layer ``layer``."""
        layers = arch.mtp_layers()
        before = layers.get(layer - 1)
        return cls(layers[layer], arch.final_hidden if before is None else before.final_hidden, weights, embed_rows)

    def enter(self, x: RowStore, tokens: Tensor, entered: RowStore, device: torch.device) -> None:
        """Fill ``entered`` (n_rows, length) with what the layer's decoder layer reads. ``x``: hidden states after the
        layer before, of at least so many positions, may be the same store; tokens (n_rows, length) int64: those whose
        embeddings meet these positions, one further for each MTP layer."""
        for start, stop in row_batches(x, device):
            hidden = self.final_hidden(self.weights, x.read(start, stop)[:, : entered.length].to(device))
            embeddings = _embedded(self.embed_rows, tokens[start:stop]).to(device).view(hidden.shape)
            entered.write(start, self.mtp.inputs(self.weights, hidden, embeddings))


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """The tokens of each expert, sorted by expert once. token (n,) int64 and weight (n,) float32, where the stream
    lies; expert e owns [bounds[e], bounds[e+1])."""

    token: Tensor
    weight: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, indices: Tensor, weights: Tensor, n_experts: int) -> ExpertTokens:
        """indices (tokens, top_k) int, weights (tokens, top_k) -> each expert's tokens in rising order."""
        order = indices.flatten().argsort(stable=True)
        counts = torch.bincount(indices.flatten(), minlength=n_experts)
        bounds = (0, *counts.cumsum(0).tolist())
        return cls(order.div(indices.shape[1], rounding_mode="floor"), weights.flatten()[order], bounds)

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """(tokens, weights) of one expert."""
        span = slice(self.bounds[expert], self.bounds[expert + 1])
        return self.token[span], self.weight[span]

    def count(self, expert: int) -> int:
        """How many tokens chose the expert."""
        return self.bounds[expert + 1] - self.bounds[expert]


Activate = Callable[[Tensor, Tensor], Tensor]
"""See `ExpertBlock`."""


def expert_hidden(activate: Activate, gate: Tensor, up: Tensor, h: Tensor) -> Tensor:
    """Input of an expert's down projection: gate, up (inter, hidden), h (tokens, hidden) -> (tokens, inter)."""
    return activate(linear(h, gate), linear(h, up))


Watch = Callable[[int, Tensor, Tensor], None]
"""Is shown what an expert gives: its number, outputs (tokens, hidden) and gate weights (tokens,)."""


def forward_layer(
    sublayers: tuple[Sublayer, ...],
    weights: Weights,
    x: RowStore,
    h: RowStore,
    device: torch.device,
    watch: Watch | None = None,
) -> list[Tensor]:
    """Carry ``x`` through one layer in place, computing on ``device``. ``h`` is scratch of the same shape. Returns the
    routing indices of each expert block."""
    routings: list[Tensor] = []
    for sublayer in sublayers:
        routed = [
            (block, route_all(block, weights, x, h, device)) for block in sublayer if isinstance(block, ExpertBlock)
        ]
        for block in sublayer:
            if isinstance(block, DenseBlock):
                _forward_dense(block, weights, x, device)
        for block, (tokens, indices) in routed:
            routings.append(indices)
            for expert in range(block.n_experts):
                forward_expert(block, weights, expert, tokens, x, h, device, watch)
    return routings


def _forward_dense(block: DenseBlock, weights: Weights, x: RowStore, device: torch.device) -> None:
    for start, stop in row_batches(x, device):
        rows = x.read(start, stop).to(device)
        (inputs,) = block.stages[-1].inputs(weights, rows)
        x.write(start, rows + linear(inputs, weights(block.output)).view(rows.shape))


def route_all(
    block: ExpertBlock, weights: Weights, x: RowStore, h: RowStore, device: torch.device
) -> tuple[ExpertTokens, Tensor]:
    """Fill ``h`` with the block's inputs and route every token -> the experts' tokens, routing indices (tokens, top_k)
    int64, both where the stream lies."""
    indices, gates = [], []
    for start, stop in row_batches(x, device):
        inputs = block.inputs(weights, x.read(start, stop).to(device))
        h.write(start, inputs)
        routing = block.route(weights, inputs)
        indices.append(routing.indices.to(x.device))
        gates.append(routing.weights.to(x.device))
    chosen = torch.cat(indices)
    return ExpertTokens.of(chosen, torch.cat(gates), block.n_experts), chosen


def forward_expert(
    block: ExpertBlock,
    weights: Weights,
    expert: int,
    tokens: ExpertTokens,
    x: RowStore,
    h: RowStore,
    device: torch.device,
    watch: Watch | None = None,
) -> None:
    """Add one expert's output to the residual of its tokens. Its weights are asked for once."""
    token, weight = tokens.of_expert(expert)
    if not len(token):
        return
    gate, up, down = (weights(names[expert]) for names in (block.gates, block.ups, block.downs))
    chunk = at_once(EXPERT_CHUNK, device)
    for part, share in zip(token.split(chunk), weight.split(chunk), strict=True):
        hidden = expert_hidden(block.activate, gate, up, h.gather(part).to(device))
        output = linear(hidden, down)
        x.add(part, output, share)
        if watch is not None:
            watch(expert, output, share)
