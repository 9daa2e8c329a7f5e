"""Sums over the tokens of all ranks, in the order of the slices: the bits of one process that has all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from quantkit.calibrate.inputs import InputMoments, combined
from quantkit.ranks.ranks import Ranks


def combined_over(ranks: Ranks, slices: Iterable[Sequence[InputMoments]]) -> list[InputMoments]:
    """`combined` of the slices of all ranks, everywhere. ``slices``: the sums of this rank's own.

    The total goes from rank to rank, and each adds its slices one after the other. So all but the first keep the sums
    of each slice until the total comes.
    """
    if ranks.count == 1:
        return combined(slices)
    total = combined(slices) if ranks.first else _added(ranks, list(slices))
    last = ranks.count - 1
    if ranks.number < last:
        _each(total, lambda tensor: ranks.send(tensor, ranks.number + 1))
    _each(total, lambda tensor: ranks.broadcast(tensor, last))
    return total


def _added(ranks: Ranks, own: Sequence[Sequence[InputMoments]]) -> list[InputMoments]:
    """The total of the ranks before, with this rank's slices added."""
    total = [sums.blank() for sums in own[0]]
    _each(total, lambda tensor: ranks.receive(tensor, ranks.number - 1))
    for sums in own:
        total = [one.plus(more) for one, more in zip(total, sums, strict=True)]
    return total


def _each(total: Sequence[InputMoments], move: Callable[[torch.Tensor], None]) -> None:
    """Move sums and numbers of tokens from or to another rank."""
    for sums in total:
        counts = torch.tensor(sums.n_tokens)
        for tensor in (counts, *sums.sums):
            move(tensor)
        sums.n_tokens = counts.tolist()
