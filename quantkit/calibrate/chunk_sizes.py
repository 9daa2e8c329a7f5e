"""How many tokens are computed at once. Constants: sums must not depend on the machine's memory."""

from __future__ import annotations

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


def at_once(tokens: int, device: torch.device) -> int:
    """Tokens that ``device`` computes at once where a processor takes ``tokens``."""
    return tokens * DEVICE_TIMES if device.type == "cuda" else tokens
