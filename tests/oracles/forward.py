"""The forward pass of any family, one layer or the whole model, from the same blocks that conversions use: plain, not
chunked, everything in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding

from quantkit.arch.base import ExpertBlock
from quantkit.arch.ops import linear

if TYPE_CHECKING:
    from quantkit.arch.base import Block, ModelArch, Sublayer, Weights


def logits(arch: ModelArch, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens (rows, tokens) int64, each row from position 0 -> (rows, tokens, vocab) float32."""
    x = embedding(tokens, weights(arch.embed))
    for layer in range(arch.n_layers):
        x = forward_layer(arch.sublayers(layer), weights, x)
    return linear(arch.final_hidden(weights, x), weights(arch.lm_head))


def forward_layer(sublayers: tuple[Sublayer, ...], weights: Weights, x: Tensor) -> Tensor:
    """x (rows, tokens, hidden) float32 -> the same shape after the decoder layer."""
    for sublayer in sublayers:
        first, *others = sublayer
        added = block_output(first, weights, x)
        for block in others:
            added += block_output(block, weights, x)
        x = x + added.view_as(x)
    return x


def block_output(block: Block, weights: Weights, x: Tensor) -> Tensor:
    """What a block adds to the residual: (rows * tokens, hidden)."""
    if isinstance(block, ExpertBlock):
        return _experts_output(block, weights, x)
    (last,) = block.stages[-1].inputs(weights, x)
    return linear(last, weights(block.output))


def _experts_output(block: ExpertBlock, weights: Weights, x: Tensor) -> Tensor:
    """Expert by expert over the tokens sorted by expert: one gather and one scatter-add each, no loop over tokens."""
    h = block.inputs(weights, x)
    routing = block.route(weights, h)
    top_k = routing.indices.shape[1]
    order = routing.indices.flatten().argsort(stable=True)
    counts = routing.indices.flatten().bincount(minlength=block.n_experts).tolist()
    tokens, gains = order // top_k, routing.weights.flatten()[order, None]
    output = torch.zeros_like(h)
    for expert, (rows, gain) in enumerate(zip(tokens.split(counts), gains.split(counts), strict=True)):
        if rows.numel() == 0:
            continue
        own = h[rows]
        hidden = block.activate(linear(own, weights(block.gates[expert])), linear(own, weights(block.ups[expert])))
        output.index_add_(0, rows, linear(hidden, weights(block.downs[expert])).mul_(gain))
    return output
