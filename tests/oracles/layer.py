"""What a calibrated layer must hand to its methods, in plain float64 loops over tokens and experts.

Who is routed where, and what a dense stage reads, comes from the family's blocks, which have tests of their own.
Everything that a conversion adds is done again here: which stream a statistic is taken in, with whose weights, over
which tokens, borrowed ones included; the shrinkage; and that gate and up share what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, Sublayer

Weights = Callable[[str], Tensor]


@dataclass(frozen=True)
class Expected:
    """hessian (in, in), cross (in, in) or None, float64; n_tokens that the statistics hold."""

    hessian: Tensor
    cross: Tensor | None
    n_tokens: int


@dataclass
class Settings:
    """What decides about the statistics. ``carried``: weights of the stream that is calibrated on."""

    original: Weights
    carried: Weights
    min_tokens: int
    shrink: float
    down_shrink: float


@dataclass
class Result:
    """Statistics by the name of each linear, and for each expert block (routed, borrowed) tokens of each expert."""

    stats: dict[str, Expected] = field(default_factory=dict)
    tokens: dict[str, list[tuple[list[int], list[int]]]] = field(default_factory=dict)


def expected_statistics(
    sublayers: tuple[Sublayer, ...], settings: Settings, x: Tensor, x_original: Tensor | None
) -> Result:
    """x, x_original (rows, tokens, hidden) float32 before the layer -> what each linear's method must be given."""
    result = Result()
    for sublayer in sublayers:
        added, added_original = torch.zeros_like(x), torch.zeros_like(x)
        for block in sublayer:
            if isinstance(block, DenseBlock):
                _dense(block, settings, x, x_original, result)
            else:
                _experts(block, settings, x, x_original, result)
            added += _output(block, settings.carried, x)
            if x_original is not None:
                added_original += _output(block, settings.original, x_original)
        x = x + added
        x_original = None if x_original is None else x_original + added_original
    return result


def _dense(block: DenseBlock, settings: Settings, x: Tensor, x_original: Tensor | None, result: Result) -> None:
    for stage in block.stages:
        inputs = stage.inputs(settings.carried, x)
        originals = (None,) * len(inputs) if x_original is None else stage.inputs(settings.original, x_original)
        for group, own, original in zip(stage.groups, inputs, originals, strict=True):
            if own.ndim == 3:  # heads of a part, which these outputs do not store
                continue
            moments = _moments(own, original, range(len(own)))
            result.stats.update(dict.fromkeys(group.linears, moments))


def _experts(block: ExpertBlock, settings: Settings, x: Tensor, x_original: Tensor | None, result: Result) -> None:
    h = block.inputs(settings.carried, x)
    h_original = None if x_original is None else block.inputs(settings.original, x_original)
    routing = block.route(settings.carried, h)
    chosen, scores = routing.indices.tolist(), routing.scores.tolist()
    pooled = _moments(h, h_original, range(len(h)))
    result.tokens[block.name] = []
    for expert in range(block.n_experts):
        routed = [token for token in range(len(h)) if expert in chosen[token]]
        others = [token for token in range(len(h)) if expert not in chosen[token]]
        others.sort(key=lambda token: -scores[token][expert])
        borrowed = others[: max(0, settings.min_tokens - len(routed))]
        result.tokens[block.name].append((routed, borrowed))
        tokens = sorted(routed + borrowed)
        gate, up, down = block.gates[expert], block.ups[expert], block.downs[expert]
        own = _towards_pool(_moments(h, h_original, tokens), pooled, settings.shrink)
        result.stats[gate] = result.stats[up] = own
        hidden = _hidden(settings.carried(gate), settings.carried(up), h)
        hidden_original = None
        if h_original is not None:
            hidden_original = _hidden(settings.original(gate), settings.original(up), h_original)
        result.stats[down] = _towards_diagonal(_moments(hidden, hidden_original, tokens), settings.down_shrink)


def _moments(x: Tensor, original: Tensor | None, tokens: list[int] | range) -> Expected:
    width = x.shape[-1]
    hessian = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros_like(hessian)
    for token in tokens:
        row = x[token].double()
        hessian += torch.outer(row, row)
        if original is not None:
            cross += torch.outer(original[token].double() - row, row)
    n = max(len(tokens), 1)
    return Expected(hessian / n, None if original is None else cross / n, len(tokens))


def _towards_pool(own: Expected, pooled: Expected, strength: float) -> Expected:
    n, k = own.n_tokens, strength * own.hessian.shape[0]
    if n + k == 0:
        return own
    cross = None
    if own.cross is not None and pooled.cross is not None:
        cross = (n * own.cross + k * pooled.cross) / (n + k)
    return Expected((n * own.hessian + k * pooled.hessian) / (n + k), cross, n)


def _towards_diagonal(own: Expected, strength: float) -> Expected:
    n, k = own.n_tokens, strength * own.hessian.shape[0]
    if n + k == 0:
        return own
    hessian = own.hessian * (n / (n + k))
    hessian.diagonal().copy_(own.hessian.diagonal())
    return Expected(hessian, None if own.cross is None else own.cross * (n / (n + k)), n)


def _hidden(gate: Tensor, up: Tensor, h: Tensor) -> Tensor:
    gated = h.double() @ gate.double().T
    return gated * gated.sigmoid() * (h.double() @ up.double().T)


def _output(block: Block, weights: Weights, x: Tensor) -> Tensor:
    """What a block adds to the residual, (rows, tokens, hidden) float32."""
    if isinstance(block, DenseBlock):
        (last,) = block.stages[-1].inputs(weights, x)
        return (last @ weights(block.output).T).view_as(x)
    h = block.inputs(weights, x)
    routing = block.route(weights, h)
    added = torch.zeros(h.shape, dtype=torch.float64)
    for token, (experts, gains) in enumerate(zip(routing.indices.tolist(), routing.weights.tolist(), strict=True)):
        for expert, gain in zip(experts, gains, strict=True):
            gate, up, down = (weights(names[expert]) for names in (block.gates, block.ups, block.downs))
            added[token] += gain * (_hidden(gate, up, h[token : token + 1]) @ down.double().T)[0]
    return added.float().view_as(x)
