"""What tuning a layer should cost: passes of its tokens forward and back, and the codes that each update decodes and
moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from quantkit.plan.decide import Decision
from quantkit.plan.shapes import Work
from quantkit.plan.tune import Tune

PASSES = 3.2
"""Forward passes that one costs: forward, back to inputs and to weights, and a tenth of the rows that decide."""
WEIGHT_BYTES, WEIGHT_BYTES_IN_KERNELS = 200, 20
"""Moved for a weight and an update: decoded twice, its gradient, its latent; by torch's passes, or by kernels."""


def tuning_seconds(
    work: Work,
    tune: Tune,
    linears: Sequence[Decision],
    forward: Callable[[Sequence[Decision], float, int], float],
    passes: Callable[[float, float], float],
    kernels: bool,
) -> float:
    """Of one layer. ``forward(linears, tokens, length)``: seconds of a pass; ``passes(bytes, at once)``: of moving
    them; ``kernels``: whether a GPU's do."""
    dense = [one for one in linears if one.spec.expert is None]
    routed = [one for one in linears if one.spec.expert is not None]
    count = max(1, len({one.spec.expert for one in routed}))
    tokens = work.tokens * (PASSES * tune.epochs + (tune.alpha < 1))  # the original layer in the quantised stream
    seconds = forward(dense, tokens, work.length) + forward(routed, tokens * work.top_k / count, 0)
    weights = sum(prod(one.spec.shape) for one in linears)
    updates = tune.epochs * max(1, work.tokens // max(tune.step_tokens, work.length))
    nbytes = WEIGHT_BYTES_IN_KERNELS if kernels else WEIGHT_BYTES
    return seconds + passes(updates * weights * nbytes, max((prod(one.spec.shape) for one in linears), default=0))
