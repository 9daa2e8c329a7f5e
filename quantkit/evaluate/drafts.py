"""How often the token that an MTP layer drafts is the one that the model itself would choose: what speculative decoding
with greedy sampling accepts of first drafts.

At position i the MTP layer has the model's hidden state and token i + 1, and predicts token i + 2. So does the model at
i + 1. They agree where both put the same token first. Counted are the positions i from the first scored one to the last
but one of a window: there are as many as scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.arch.ops import linear
from quantkit.calibrate.chunk_sizes import POSITIONS, VOCAB_BLOCK
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import MtpEntrance, forward_layer, row_batches
from quantkit.evaluate.token_scores import Head

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

FinalHidden = Callable[["Weights", Tensor], Tensor]
"""See `ModelArch.final_hidden`."""


@dataclass(frozen=True, slots=True)
class Draft:
    """The first MTP layer of a model: its number, and rows of its vocabulary matrices as of `compare.Model`."""

    layer: int
    embed_rows: Callable[[Tensor], Tensor]
    head_rows: Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class DraftScores:
    """Whether draft and model put the same token first: (n_rows, scored) bool. ``reference``: None if it was not
    run."""

    reference: Tensor | None
    candidate: Tensor


def same_drafts(
    head: Head, draft: Draft, tokens: Tensor, scratch: RowStore, first: int, cross: Callable[[], None]
) -> Tensor:
    """tokens (n_rows, length) int64, scored from position ``first`` on -> (n_rows, length - 1 - first) bool on the CPU.
    The hidden states of ``head`` are used up; ``cross``: what is done to them after a layer; ``scratch`` has their
    shape."""
    arch, weights, x = head.arch, head.weights, head.x
    chosen = _first_choices(head, arch.final_hidden, head.head_rows)
    entrance = MtpEntrance.of(arch, draft.layer, weights, draft.embed_rows)
    # The last position has no next token. It takes any: nothing before it sees it, and it is not counted.
    entrance.enter(x, tokens.roll(-1, 1), x, head.device)
    forward_layer(arch.sublayers(draft.layer), weights, x, scratch, head.device)
    cross()
    drafted = _first_choices(head, entrance.mtp.final_hidden, draft.head_rows)
    return drafted[:, first:-1] == chosen[:, first + 1 :]


def _first_choices(head: Head, final: FinalHidden, head_rows: Callable[[int, int], Tensor]) -> Tensor:
    """The most likely token of each position: (n_rows, length) int64 on the CPU. The vocabulary in blocks."""
    x, vocab_size = head.x, head.arch.vocab_size
    top = torch.full((x.n_rows * x.length,), -torch.inf, device=head.device)
    token = torch.zeros(len(top), dtype=torch.int64, device=head.device)
    for first in range(0, vocab_size, VOCAB_BLOCK):
        block = head_rows(first, min(first + VOCAB_BLOCK, vocab_size))
        for start, stop in row_batches(x):
            inputs = final(head.weights, x.read(start, stop).to(head.device)).flatten(0, 1)
            at = start * x.length
            for part in inputs.split(POSITIONS):
                span = slice(at, at + len(part))
                at = span.stop
                found, place = linear(part, block).max(-1)
                token[span] = torch.where(found > top[span], place + first, token[span])
                top[span] = torch.maximum(found, top[span])
    return token.view(x.n_rows, x.length).cpu()
