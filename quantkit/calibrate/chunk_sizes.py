"""How many tokens are computed at once. Constants: sums must not depend on the machine's memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 2048
"""Tokens that go through a dense block at once, in whole rows."""

EXPERT_CHUNK = 4096
"""Tokens of one expert gathered at once."""

TOKEN_SLICES = 8
"""Slices of consecutive rows, each of which has a sum of its own. With 1, 2, 4 or 8 ranks, each of which takes some
slices in a row, sums over all tokens have the same bits."""
VOCAB_BLOCK = 8192
"""Tokens of the vocabulary whose logits are computed at once."""
POSITIONS = 1024
"""Positions whose logits of one block exist at a time: 32 MiB."""
SCORED_GROUP = 8192
"""Positions whose most likely tokens are in memory at a time; the output matrix is read once for each such group."""

DEVICE_TIMES = 8
"""A GPU takes so many times as many, or it would wait for launches."""


def row_slices(n_rows: int) -> list[tuple[int, int]]:
    """[first, stop) of each slice of rows, as even as possible; fewer slices for fewer rows than `TOKEN_SLICES`."""
    bounds = [n_rows * number // TOKEN_SLICES for number in range(TOKEN_SLICES + 1)]
    return [(first, stop) for first, stop in pairwise(bounds) if stop > first]


@dataclass(frozen=True, slots=True)
class OwnRows:
    """The rows of one rank: slices number ``first_slice`` on, the first of which begins at row ``first`` of
    ``n_rows`` in all. ``slices``: [first, stop) of each, counted from this rank's first row."""

    n_rows: int
    first: int
    first_slice: int
    slices: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Rows of this rank."""
        return self.slices[-1][1]


def own_rows(n_rows: int, rank: int = 0, ranks: int = 1) -> OwnRows:
    """The rows of one of 1, 2, 4 or 8 ranks: an even share of the slices. There must be a row for each rank."""
    assert n_rows >= ranks, f"{n_rows} rows for {ranks} ranks"
    first, stop = (n_rows * number // ranks for number in (rank, rank + 1))
    slices = row_slices(n_rows)
    own = [number for number, (start, _) in enumerate(slices) if first <= start < stop]
    return OwnRows(n_rows, first, own[0], tuple((slices[n][0] - first, slices[n][1] - first) for n in own))


def at_once(tokens: int, device: torch.device) -> int:
    """Tokens that ``device`` computes at once where a processor takes ``tokens``."""
    return tokens * DEVICE_TIMES if device.type == "cuda" else tokens
