"""Gated MLPs, dense and as routed experts, and DeepSeek V3's router (arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, ExpertBlock, InputGroup, Routing, Stage
from quantkit.arch.ops import linear, rms_norm, swiglu

if TYPE_CHECKING:
    from quantkit.arch.base import Weights


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm in front of an MLP: tensor name and epsilon."""

    weight: str
    eps: float


@dataclass(frozen=True, slots=True)
class GroupedSigmoidRouter:
    """``topk_method`` noaux_tc: experts are chosen by biased scores within the best groups, weighted by unbiased ones.

    ``weight`` (experts, hidden) and ``bias`` (experts,) are tensor names; the experts form ``n_groups`` equal runs, of
    which ``top_groups`` stay.
    """

    weight: str
    bias: str
    n_groups: int
    top_groups: int
    top_k: int
    normalize: bool
    scale: float

    def route(self, weights: Weights, h: Tensor) -> Routing:
        """h (tokens, hidden) -> `Routing`, all in float32. Ties fall as in transformers (same `topk` calls)."""
        affinity = linear(h, weights(self.weight).float()).sigmoid_()
        scores = affinity + weights(self.bias)
        candidates = scores if self.top_groups == self.n_groups else self._within_best_groups(scores)
        indices = candidates.topk(self.top_k, dim=-1, sorted=False).indices
        chosen = affinity.gather(1, indices)
        if self.normalize:
            chosen /= chosen.sum(dim=-1, keepdim=True) + 1e-20
        return Routing(indices=indices, weights=chosen.mul_(self.scale), scores=scores)

    def _within_best_groups(self, scores: Tensor) -> Tensor:
        """scores (tokens, experts) with -inf outside the ``top_groups`` groups whose two best scores sum highest."""
        grouped = scores.unflatten(-1, (self.n_groups, -1))
        ranks = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = ranks.topk(self.top_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(ranks, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


def mlp_block(name: str, prefix: str, norm: Norm) -> DenseBlock:
    """A gated MLP that every token passes; tensor names start with ``prefix`` ("model.layers.0.mlp.")."""
    gate, up, down = (f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down"))
    return DenseBlock(
        name=name,
        stages=(
            Stage((InputGroup((gate, up)),), partial(_mlp_inputs, norm)),
            Stage((InputGroup((down,)),), partial(_mlp_hidden, norm, gate, up)),
        ),
    )


def expert_block(name: str, prefix: str, n_experts: int, norm: Norm, router: GroupedSigmoidRouter) -> ExpertBlock:
    """Routed gated MLPs, named ``<prefix><expert>.{gate,up,down}_proj.weight``."""
    gates, ups, downs = (
        tuple(f"{prefix}{expert}.{part}_proj.weight" for expert in range(n_experts)) for part in ("gate", "up", "down")
    )
    return ExpertBlock(
        name=name,
        inputs=partial(_normed, norm),
        route=router.route,
        activate=swiglu,
        gates=gates,
        ups=ups,
        downs=downs,
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
