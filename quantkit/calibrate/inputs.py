"""What linears see: second moments of their inputs in the stream that carries the quantised weights, and how far it has
drifted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics for B matrices of one shape (B = 1 for a dense linear, a batch of experts otherwise).

    hessian (B, in, in) float32: mean of x x^T over tokens; its diagonal is the imatrix. (GPTQ's factor 2 changes no
    code.)
    cross (B, in, in) float32 or None: mean of (x_original - x) x^T, x_original being the same token in the unquantised
    stream.
    n_tokens: tokens that each matrix saw.
    """

    hessian: Tensor
    cross: Tensor | None
    n_tokens: tuple[int, ...]

    @property
    def importance(self) -> Tensor:
        """(B, in) float32: mean square of each input, a view of the hessian's diagonal."""
        return self.hessian.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, slots=True)
class InputImportance:
    """The part of `InputStats` that an imatrix file holds: importance (B, in) float32."""

    importance: Tensor
    n_tokens: tuple[int, ...]


Inputs = InputStats | InputImportance


class InputMoments:
    """Sums behind `InputStats` for one matrix, filled token batch by token batch."""

    def __init__(self, in_features: int, *, cross: bool, device: torch.device) -> None:
        self.n_tokens = 0
        self._hessian = torch.zeros(in_features, in_features, device=device)
        self._cross = torch.zeros(in_features, in_features, device=device) if cross else None

    def add(self, x: Tensor, original: Tensor | None) -> None:
        """x and original (tokens, in) float32: the same tokens in the calibrated and in the unquantised stream."""
        self.n_tokens += len(x)
        self._hessian.addmm_(x.T, x)
        if self._cross is not None:
            assert original is not None
            self._cross.addmm_((original - x).T, x)

    def stats(self) -> InputStats:
        """The means so far, as a batch of one. The sums are handed over: call it once."""
        count = max(self.n_tokens, 1)
        cross = None if self._cross is None else self._cross.div_(count).unsqueeze(0)
        return InputStats(self._hessian.div_(count).unsqueeze(0), cross, (self.n_tokens,))


def shrunk(stats: InputStats, pooled: InputStats, strength: float) -> InputStats:
    """Pull each matrix's moments towards the pooled ones: (n H_e + k H_pool) / (n + k), k = strength * in_features
    tokens.

    An expert with few tokens knows little about its own inputs; with many it keeps them. hessian and cross move alike,
    so that the least-squares target stays consistent. Overwrites ``stats``.
    """
    k = strength * stats.hessian.shape[-1]
    if k == 0:
        return stats
    count = torch.tensor(stats.n_tokens, dtype=torch.float32, device=stats.hessian.device)[:, None, None]
    share = k / (count + k)
    stats.hessian.lerp_(pooled.hessian.expand_as(stats.hessian), share)
    if stats.cross is not None and pooled.cross is not None:
        stats.cross.lerp_(pooled.cross.expand_as(stats.cross), share)
    return stats


def shrunk_to_diagonal(stats: InputStats, strength: float) -> InputStats:
    """Weaken what was learnt between different inputs: off-diagonal moments times n / (n + k), k = strength *
    in_features tokens.

    For ``down``, whose inputs are an expert's own hidden units, so that no pool over experts means anything. Overwrites
    ``stats``.
    """
    k = strength * stats.hessian.shape[-1]
    if k == 0:
        return stats
    count = torch.tensor(stats.n_tokens, dtype=torch.float32, device=stats.hessian.device)[:, None, None]
    keep = count / (count + k)
    diagonal = torch.diagonal(stats.hessian, dim1=-2, dim2=-1).clone()
    stats.hessian.mul_(keep)
    torch.diagonal(stats.hessian, dim1=-2, dim2=-1).copy_(diagonal)
    if stats.cross is not None:
        stats.cross.mul_(keep)
    return stats
