"""Adam (arXiv 1412.6980), for latents whose gradients come a group of experts at a time, and for scales and norms.
torch's own loads its compiler first, for seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.99), 1e-20
"""Gradients of single weights of a large layer are as small as 1e-12."""


class Moments:
    """Running means of gradients and of their squares. ``count``: updates, which the caller counts."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.count = 0
        self._first = torch.zeros(shape, device=device)
        self._second = torch.zeros(shape, device=device)

    def step(self, part: slice, gradient: Tensor, rate: float) -> Tensor:
        """How far the numbers go whose gradient this is."""
        first, second = self._first[part], self._second[part]
        first.lerp_(gradient.float(), 1 - BETAS[0])
        second.lerp_(gradient.float().square(), 1 - BETAS[1])
        scale = (second / (1 - BETAS[1] ** self.count)).sqrt_().add_(EPS)
        return (first / (1 - BETAS[0] ** self.count)).div_(scale).mul_(-rate)


class Adam:
    """Moves tensors along their ``grad``. One that never gets a gradient stays."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._moved = [(tensor, Moments(tensor.shape, tensor.device)) for tensor in tensors]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; gradients are forgotten."""
        for tensor, moments in self._moved:
            if tensor.grad is not None:
                moments.count += 1
                tensor += moments.step(slice(None), tensor.grad, rate)
                tensor.grad = None
