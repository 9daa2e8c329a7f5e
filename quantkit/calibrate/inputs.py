"""What linears see: second moments of their inputs in the stream that carries the quantised weights, and how far it has
drifted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, backend_of


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

    def matrices(self, start: int, stop: int) -> InputImportance:
        """Those of the matrices [start, stop)."""
        return InputImportance(self.importance[start:stop], self.n_tokens[start:stop])


Inputs = InputStats | InputImportance


class InputMoments:
    """Sums behind `InputStats` for one matrix, the heads of one, or a batch of experts, filled token batch by token
    batch.

    ``full``: whole second moments; else only their diagonal, for methods that use no more. Sums are float32. On a GPU
    with kernels their factors are rounded to bfloat16, in which calibration computes there anyway, but for sources in
    float32 or float16.
    """

    def __init__(
        self, in_features: int, *, cross: bool, device: torch.device, matrices: int = 1, full: bool = True
    ) -> None:
        self._n_tokens = [0] * matrices
        self._full = full
        self._sums = torch.zeros(matrices, in_features, *([in_features] if full else []), device=device)
        self._cross = torch.zeros_like(self._sums) if cross and full else None

    @classmethod
    def like(cls, x: Tensor, *, cross: bool, full: bool = True) -> InputMoments:
        """Empty sums for inputs (tokens, in) or (heads, tokens, in)."""
        heads = len(x) if x.ndim == 3 else 1
        return cls(x.shape[-1], cross=cross, device=x.device, matrices=heads, full=full)

    def add(self, x: Tensor, original: Tensor | None, number: int = 0) -> None:
        """The same tokens in the calibrated and in the unquantised stream: x and original (tokens, in) of matrix
        ``number``, or (heads, tokens, in) of all."""
        matrices = range(len(x)) if x.ndim == 3 else (number,)
        for head, matrix in enumerate(matrices):
            own, other = (rows if rows is None or rows.ndim == 2 else rows[head] for rows in (x, original))
            assert own is not None
            self._n_tokens[matrix] += len(own)
            if len(own):  # an expert without tokens: not every product takes none
                self._add(matrix, own, other)

    def _add(self, matrix: int, x: Tensor, original: Tensor | None) -> None:
        if not self._full:
            self._sums[matrix] += x.float().square().sum(0)
            return
        _add_squares(self._sums[matrix], x)
        if self._cross is not None:
            assert original is not None
            _add_products(self._cross[matrix], original - x, x)

    def plus(self, other: InputMoments) -> InputMoments:
        """This with the sums of other tokens added to it, element by element in float32; ``other`` stays."""
        assert self._full == other._full, "both whole, or both their diagonal"
        assert (self._cross is None) == (other._cross is None), "both with the cross term, or neither"
        self._n_tokens = [own + more for own, more in zip(self._n_tokens, other._n_tokens, strict=True)]
        self._sums += other._sums
        if self._cross is not None and other._cross is not None:
            self._cross += other._cross
        return self

    def blank(self) -> InputMoments:
        """Empty sums of the same shape."""
        heads, in_features = self._sums.shape[:2]
        return InputMoments(
            in_features, cross=self._cross is not None, device=self._sums.device, matrices=heads, full=self._full
        )

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The sums themselves, which another rank's may overwrite."""
        return (self._sums,) if self._cross is None else (self._sums, self._cross)

    @property
    def n_tokens(self) -> list[int]:
        """Tokens that each matrix saw so far."""
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, counts: list[int]) -> None:
        self._n_tokens = counts

    def importance(self) -> InputImportance:
        """The means so far of sums that are no more than a diagonal. The sums are handed over: call it once."""
        stats = self.stats()
        assert isinstance(stats, InputImportance), "whole second moments"
        return stats

    def stats(self) -> Inputs:
        """The means so far. The sums are handed over: call it once."""
        n_tokens = tuple(self._n_tokens)
        for sums in (self._sums, self._cross):
            for one, count in zip(() if sums is None else sums, n_tokens, strict=False):
                one.div_(max(count, 1))
        return InputStats(self._sums, self._cross, n_tokens) if self._full else InputImportance(self._sums, n_tokens)


def combined(slices: Iterable[Sequence[InputMoments]]) -> list[InputMoments]:
    """Totals of the sums of all slices of rows, added in their order: the same bits, whoever computed a slice.

    Each slice has sums of one or more input groups. The first becomes the total; of the others only one needs to exist
    at a time. A rank may hand its total to the next one, as the first of that one's slices.
    """
    total: list[InputMoments] = []
    for sums in slices:
        total = [one.plus(more) for one, more in zip(total, sums, strict=True)] if total else list(sums)
        del sums  # before the next slice begins its own
    return total


def _add_squares(sums: Tensor, x: Tensor) -> None:
    """sums (in, in) += x^T x over tokens."""
    if backend_of(sums) is Backend.TRITON:
        from quantkit.kernels.triton.moments import add_squares_

        add_squares_(sums, x)
    else:
        x = x.float()
        sums.addmm_(x.T, x)


def _add_products(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums (in, in) += left^T right over tokens."""
    if backend_of(sums) is Backend.TRITON:
        from quantkit.kernels.triton.moments import add_products_

        add_products_(sums, left, right)
    else:
        sums.addmm_(left.float().T, right.float())


def shrunk(stats: Inputs, pooled: Inputs, strength: float) -> Inputs:
    """Pull each matrix's moments towards the pooled ones: (n H_e + k H_pool) / (n + k), k = strength * in_features
    tokens.

    An expert with few tokens knows little about its own inputs; with many it keeps them. hessian and cross move alike,
    so that the least-squares target stays consistent. Overwrites ``stats``.
    """
    k = strength * stats.importance.shape[-1]
    if k == 0:
        return stats
    count = _counts(stats)
    share = k / (count + k)
    if isinstance(stats, InputImportance):
        stats.importance.lerp_(pooled.importance.expand_as(stats.importance), share[..., 0])
        return stats
    assert isinstance(pooled, InputStats), "the pool of full moments is full"
    stats.hessian.lerp_(pooled.hessian.expand_as(stats.hessian), share)
    if stats.cross is not None and pooled.cross is not None:
        stats.cross.lerp_(pooled.cross.expand_as(stats.cross), share)
    return stats


def shrunk_to_diagonal(stats: Inputs, strength: float) -> Inputs:
    """Weaken what was learnt between different inputs: off-diagonal moments times n / (n + k), k = strength *
    in_features tokens.

    For ``down``, whose inputs are an expert's own hidden units, so that no pool over experts means anything. Overwrites
    ``stats``.
    """
    k = strength * stats.importance.shape[-1]
    if k == 0 or isinstance(stats, InputImportance):
        return stats
    count = _counts(stats)
    keep = count / (count + k)
    diagonal = torch.diagonal(stats.hessian, dim1=-2, dim2=-1).clone()
    stats.hessian.mul_(keep)
    torch.diagonal(stats.hessian, dim1=-2, dim2=-1).copy_(diagonal)
    if stats.cross is not None:
        stats.cross.mul_(keep)
    return stats


def _counts(stats: Inputs) -> Tensor:
    """Tokens of each matrix, (B, 1, 1) float32. A GPU is not waited for."""
    counts = torch.tensor(stats.n_tokens, dtype=torch.float32)
    return counts.to(stats.importance.device, non_blocking=True)[:, None, None]
