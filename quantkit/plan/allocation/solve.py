"""One option for each group, so that the bytes stay within a budget and the sum of losses is small.

For a price lambda of a byte each group alone takes the option with the least loss + lambda * bytes; bisection finds the
price at which the sum fits (Everett, 1963: these are optimal for the bytes that they take). What is left over is spent
on the changes that save most loss for each byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_STEPS = 60
_CHEAPEST, _DEAREST = 1e-40, 1e20
"""Prices in nats for a byte between which every real one lies."""


@dataclass(frozen=True, slots=True)
class Option:
    """``nbytes`` and the loss (nats per token) of one way to store a group."""

    nbytes: int
    loss: float


Groups = Sequence[Sequence[Option]]
_Key = Callable[[Option], tuple[float, float]]


def solve(groups: Groups, budget: int) -> list[int] | None:
    """The place of each group's option; None if even the smallest ones take more than ``budget`` bytes."""
    if total_bytes(groups, smallest(groups)) > budget:
        return None
    best = _at_price(groups, 0.0)
    if total_bytes(groups, best) <= budget:
        return best
    low, high = _CHEAPEST, _DEAREST
    best = smallest(groups)
    for _ in range(_STEPS):
        price = math.sqrt(low * high)
        found = _at_price(groups, price)
        if total_bytes(groups, found) > budget:
            low = price
        else:
            best, high = found, price
    return _filled(groups, best, budget - total_bytes(groups, best))


def smallest(groups: Groups) -> list[int]:
    """The options with the fewest bytes."""
    return [_least(group, lambda option: (option.nbytes, option.loss)) for group in groups]


def total_bytes(groups: Groups, chosen: Sequence[int]) -> int:
    """Bytes of all groups."""
    return sum(group[place].nbytes for group, place in zip(groups, chosen, strict=True))


def total_loss(groups: Groups, chosen: Sequence[int]) -> float:
    """Predicted loss of all groups, in nats per token."""
    return math.fsum(group[place].loss for group, place in zip(groups, chosen, strict=True))


def _at_price(groups: Groups, price: float) -> list[int]:
    return [_least(group, lambda option: (option.loss + price * option.nbytes, option.nbytes)) for group in groups]


def _least(group: Sequence[Option], key: _Key) -> int:
    return min(range(len(group)), key=lambda place: key(group[place]))


def _filled(groups: Groups, chosen: list[int], left: int) -> list[int]:
    """Spend ``left`` bytes, until no change that saves loss is small enough."""
    chosen = list(chosen)
    while True:
        best = max(_changes(groups, chosen, left), default=None)
        if best is None:
            return chosen
        _, number, place = best
        left -= groups[number][place].nbytes - groups[number][chosen[number]].nbytes
        chosen[number] = place


def _changes(groups: Groups, chosen: Sequence[int], left: int) -> Iterator[tuple[float, int, int]]:
    """(loss saved for each byte, group, option)."""
    for number, group in enumerate(groups):
        now = group[chosen[number]]
        for place, option in enumerate(group):
            saved, more = now.loss - option.loss, option.nbytes - now.nbytes
            if saved > 0 and more <= left:
                yield saved / max(more, 1), number, place
