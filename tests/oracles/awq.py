"""AWQ's search written out: float64, one pair of exponents, one linear and one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.schemes import ChosenScheme


@dataclass(frozen=True)
class Linear:
    """weight (out, in), mean squares (in,) of what it reads over ``tokens`` tokens."""

    weight: Tensor
    scheme: ChosenScheme
    importance: Tensor
    tokens: int


def best_factors(importance: Tensor, linears: Sequence[Linear], grid: int) -> tuple[Tensor, float, float]:
    """importance (n,) of the channels -> factors (n,), their loss, and that without factors."""
    inputs = _floored(importance.double()).sqrt()
    columns = _column_sizes(linears, len(importance))
    best, found, without = float("inf"), torch.ones_like(inputs), float("nan")
    for first in range(grid):
        for second in range(grid):
            factors = torch.tensor(
                [float(x) ** ((first / (grid - 1)) ** 2) / float(w) ** (second / (grid - 1))
                 for x, w in zip(inputs, columns, strict=True)],
                dtype=torch.float64,
            )  # fmt: skip
            factors = factors / float(factors.max() * factors.min()) ** 0.5
            loss = sum(_loss(linear, factors) for linear in linears)
            if first == second == 0:
                without = loss
            if loss < best:
                best, found = loss, factors
    return found, best, without


def _column_sizes(linears: Sequence[Linear], width: int) -> Tensor:
    powers = [0.0] * width
    for linear in linears:
        for row in linear.weight.double():
            for column, value in enumerate(row.tolist()):
                powers[column] += linear.tokens * value**4
    mean = sum(powers) / width
    return torch.tensor([(power + 1e-8 * mean) ** 0.25 for power in powers], dtype=torch.float64)


def _loss(linear: Linear, factors: Tensor) -> float:
    search = _floored(linear.importance.double() / factors.square()).float()[None]
    scaled = (linear.weight.double() * factors).float()[None]
    stored = linear.scheme.rounded(scaled, search, points=40, signed=True)
    decoded = linear.scheme.decode(**stored)[0].double() / factors
    weighed = _floored(linear.importance.double())
    rows = zip(decoded, linear.weight.double(), strict=True)
    return linear.tokens * sum(float(((own - row).square() * weighed).sum()) for own, row in rows)


def _floored(importance: Tensor) -> Tensor:
    return importance + 0.01 * importance.mean()
