"""Gated MLPs, dense and as routed experts, and how the experts of a token are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from quantkit.arch.base import DenseBlock, ExpertBlock, InputGroup, LinearRows, MlpNames, Producer, Routing, Stage
from quantkit.arch.ops import linear, rms_norm, swiglu

if TYPE_CHECKING:
    from quantkit.arch.base import Weights


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm in front of an MLP: tensor name and epsilon."""

    weight: str
    eps: float


class Router(Protocol):
    """What chooses the experts of a token. ``weight``: name of the tensor (experts, hidden) that reads the normed
    stream."""

    @property
    def weight(self) -> str: ...

    def route(self, weights: Weights, h: Tensor) -> Routing:
        """h (tokens, hidden) -> `Routing`."""
        ...


Gating = Literal["softmax", "sigmoid", "sqrtsoftplus"]
"""How logits become the affinity of a token to an expert. The last: sqrt(log(1 + e^x))."""


@dataclass(frozen=True, slots=True)
class ScoredRouter:
    """Experts of the highest scores within the best groups, weighted by their affinity.

    A score is the affinity, plus ``bias`` where there is one (arXiv 2412.19437, section 2.1.2). The experts form
    ``n_groups`` equal runs, of which ``top_groups`` stay: those whose ``ranked_by`` best scores have the highest sum
    (1: DeepSeek V2, arXiv 2405.04434, section 2.2.2; 2: V3). ``normalize``: the weights of a token sum to ``scale``.

    ``weight`` (experts, hidden) and ``bias`` (experts,) are tensor names.
    """

    weight: str
    top_k: int
    gating: Gating
    normalize: bool
    scale: float = 1.0
    bias: str | None = None
    n_groups: int = 1
    top_groups: int = 1
    ranked_by: int = 2

    def route(self, weights: Weights, h: Tensor) -> Routing:
        """h (tokens, hidden) -> `Routing`, all in float32. Ties fall as in transformers (same `topk` calls)."""
        affinity = _affinity(linear(h, weights(self.weight).float()), self.gating)
        scores = affinity if self.bias is None else affinity + weights(self.bias)
        candidates = scores if self.top_groups == self.n_groups else self._within_best_groups(scores)
        indices = candidates.topk(self.top_k, dim=-1, sorted=False).indices
        chosen = affinity.gather(1, indices)
        if self.normalize:
            chosen /= chosen.sum(dim=-1, keepdim=True) + 1e-20
        return Routing(indices=indices, weights=chosen.mul_(self.scale), scores=scores)

    def _within_best_groups(self, scores: Tensor) -> Tensor:
        """scores (tokens, experts) with -inf outside the best groups."""
        grouped = scores.unflatten(-1, (self.n_groups, -1))
        ranks = grouped.topk(self.ranked_by, dim=-1).values.sum(dim=-1)
        best = ranks.topk(self.top_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(ranks, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


def _affinity(logits: Tensor, gating: Gating) -> Tensor:
    """logits (tokens, experts) float32, overwritten -> the same shape."""
    match gating:
        case "softmax":
            return logits.softmax(dim=-1)
        case "sigmoid":
            return logits.sigmoid_()
        case "sqrtsoftplus":
            return softplus(logits).sqrt_()


@dataclass(frozen=True, slots=True)
class Mlp:
    """Tensor names of a gated MLP."""

    gate: str
    up: str
    down: str

    @classmethod
    def named(cls, prefix: str, names: MlpNames) -> Mlp:
        """The names of the MLP whose tensors start with ``prefix`` ("model.layers.0.mlp.")."""
        return cls(*(f"{prefix}{name}.weight" for name in (names.gate, names.up, names.down)))


def readers(mlps: Iterable[Mlp]) -> tuple[str, ...]:
    """The tensors of several MLPs that read their input."""
    return tuple(name for mlp in mlps for name in (mlp.gate, mlp.up))


def mlp_block(name: str, mlp: Mlp, norm: Norm, producer: Producer | None) -> DenseBlock:
    """A gated MLP that every token passes. ``producer``: of its inputs, with all that read them."""
    return DenseBlock(
        name=name,
        stages=(
            Stage((InputGroup((mlp.gate, mlp.up), producer),), partial(_mlp_inputs, norm)),
            Stage((InputGroup((mlp.down,), _up_rows(mlp)),), partial(_mlp_hidden, norm, mlp.gate, mlp.up)),
        ),
    )


def _up_rows(mlp: Mlp) -> LinearRows:
    """The hidden, silu(gate) * up, is linear in up."""
    return LinearRows(mlp.up, (mlp.down,))


def expert_block(
    name: str, experts: Sequence[Mlp], norm: Norm, router: Router, producer: Producer | None
) -> ExpertBlock:
    """Routed gated MLPs. ``producer``: of the inputs of router and experts, with all that read them."""
    return ExpertBlock(
        name=name,
        inputs=partial(_normed, norm),
        route=router.route,
        router=router.weight,
        activate=swiglu,
        gates=tuple(mlp.gate for mlp in experts),
        ups=tuple(mlp.up for mlp in experts),
        downs=tuple(mlp.down for mlp in experts),
        producer=producer,
        down_producers=tuple(map(_up_rows, experts)),
    )


def _normed(norm: Norm, weights: Weights, x: Tensor) -> Tensor:
    """x (rows, tokens, hidden) -> (rows * tokens, hidden)."""
    return rms_norm(x.flatten(0, 1), weights(norm.weight), norm.eps)


def _mlp_inputs(norm: Norm, weights: Weights, x: Tensor) -> tuple[Tensor]:
    return (_normed(norm, weights, x),)


def _mlp_hidden(norm: Norm, gate: str, up: str, weights: Weights, x: Tensor) -> tuple[Tensor]:
    """What the down projection reads: (rows * tokens, width)."""
    h = _normed(norm, weights, x)
    return (swiglu(linear(h, weights(gate)), linear(h, weights(up))),)
