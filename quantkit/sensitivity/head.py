"""One label for each position, drawn from the model's own softmax, and the gradient of the summed cross-entropy with
respect to the hidden states after the last layer. The vocabulary goes in blocks: no position's logits exist as a whole.

The label is the first token up to which the probabilities add up to more than a uniform number of that position: the
same for any blocks, and, but for rounding, on any device. The gradient with respect to the head's input is
sum_v p_v w_v - w_label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.calibrate.chunk_sizes import POSITIONS, SCORED_GROUP, VOCAB_BLOCK, at_once
from quantkit.calibrate.hidden_states import RowStore
from quantkit.errors import CalibrationError
from quantkit.evaluate.token_scores import OnlineSoftmax

if TYPE_CHECKING:
    from quantkit.arch.base import ModelArch, Weights

DRAWN_BELOW = 1 - 1e-5
"""Uniform numbers stay below what probabilities in float32 add up to."""


def uniform_numbers(seed: int, n_tokens: int) -> Tensor:
    """(tokens,) float64, for each position one."""
    return DRAWN_BELOW * torch.rand(n_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class SampledHead:
    """What follows the last layer. ``head_rows(start, stop)``: rows of the output matrix, float32 on the device."""

    arch: ModelArch
    weights: Weights
    head_rows: Callable[[int, int], Tensor]
    device: torch.device

    def backward(self, x: RowStore, seed: int) -> Tensor:
        """Replace ``x``, the hidden states after the last layer, by the gradient with respect to them -> labels
        (tokens,) int64. Raises `CalibrationError` if a logit is not finite."""
        drawn = uniform_numbers(seed, x.n_rows * x.length).to(self.device)
        step = max(1, at_once(SCORED_GROUP, self.device) // x.length)
        labels: list[Tensor] = []
        for start in range(0, x.n_rows, step):
            stop = min(start + step, x.n_rows)
            leaf = x.read(start, stop).to(self.device).float().flatten(0, 1).detach().requires_grad_()
            with torch.enable_grad():
                inputs = self.arch.final_hidden(self.weights, leaf)
            given, found = self._gradient(inputs.detach().float(), drawn[start * x.length : stop * x.length])
            (own,) = torch.autograd.grad(inputs, leaf, given.to(inputs.dtype))
            x.write(start, own)
            labels.append(found.cpu())
        return torch.cat(labels)

    def _gradient(self, inputs: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (n, hidden) of the output matrix, uniform numbers (n,) -> gradient (n, hidden), labels (n,)."""
        log_sums = self._log_sums(inputs)
        below = torch.zeros_like(drawn)  # probability of all tokens of earlier blocks
        labels = torch.full((len(inputs),), -1, dtype=torch.int64, device=inputs.device)
        gradient = torch.zeros_like(inputs)
        for token, block in self._blocks():
            for span in _spans(len(inputs)):
                chances = (linear(inputs[span], block) - log_sums[span]).exp_()
                gradient[span] += chances @ block
                reached = chances.cumsum(-1, dtype=torch.float64) + below[span].unsqueeze(1)
                place = (reached <= drawn[span].unsqueeze(1)).sum(-1)
                here = (place < len(block)) & (labels[span] < 0)
                labels[span] = torch.where(here, place + token, labels[span])
                gradient[span] -= block[place.clamp(max=len(block) - 1)] * here.unsqueeze(1)
                below[span] = reached[:, -1]
        return gradient, labels

    def _log_sums(self, inputs: Tensor) -> Tensor:
        """(n, 1) float32: log of the sum of exp(logit)."""
        softmax = OnlineSoftmax(torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))
        for token, block in self._blocks():
            for span in _spans(len(inputs)):
                softmax.add(span, token, linear(inputs[span], block))
        found = softmax.log_sum()
        if not bool(found.isfinite().all()):
            raise CalibrationError(
                "logits of the original model are not finite.",
                hint="Its weights are damaged, or overflow: `quantkit verify` and `quantkit evaluate` say more.",
            )
        return found.float().unsqueeze(1)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First token and rows of each block of the output matrix."""
        for token in range(0, self.arch.vocab_size, VOCAB_BLOCK):
            yield token, self.head_rows(token, min(token + VOCAB_BLOCK, self.arch.vocab_size))


def _spans(n: int) -> Iterator[slice]:
    yield from (slice(at, min(at + POSITIONS, n)) for at in range(0, n, POSITIONS))
