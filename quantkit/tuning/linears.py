"""Linears of a layer while it is tuned: one stored matrix, or one projection of some experts.

Codes move as latents (`latents`); scales relative to where they began, by Adam. What the forward pass computes with is
always what would be stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from quantkit.schemes.tunable import Tunable
from quantkit.tuning.adam import Moments
from quantkit.tuning.latents import ONE, decode, group_sums, move, nearest_offset, update

if TYPE_CHECKING:
    from quantkit.schemes.grid import Stored

CLIP = 0.49
"""How far a latent may begin from the code that a method chose. Codes that begin exactly at a level hardly move."""


class Matrices(Protocol):
    """B matrices that the tuned layer computes with."""

    def weight(self, part: slice) -> Tensor:
        """Some of them, (b, out, in)."""
        ...

    @property
    def moves(self) -> bool:
        """Whether gradients change them."""
        ...

    def take(self, part: slice, gradient: Tensor) -> None:
        """The loss's gradient (b, out, in) at some of them."""
        ...


@dataclass(frozen=True, slots=True)
class FixedMatrices:
    """Weights (B, out, in) that stay."""

    values: Tensor
    moves: bool = False

    def weight(self, part: slice) -> Tensor:
        """See `Matrices.weight`."""
        return self.values[part]

    def take(self, part: slice, gradient: Tensor) -> None:
        """Nothing moves."""


class TunedMatrices:
    """Weights that move. ``begin`` an update, ``take`` the gradients of all, then let the optimizer of `changes` step.

    ``changes``: relative changes of the parameters, with gradients after `finish`.
    """

    moves = True

    def __init__(self, tunable: Tunable, original: Callable[[int], Tensor], dtype: torch.dtype, *, adam: bool) -> None:
        """``original(i)``: the weight that matrix i was quantised from, or those of all matrices one under the other;
        ``dtype``: of the forward pass; ``adam``: move codes by it."""
        self._tunable, self._dtype = tunable, dtype
        self._levels = tunable.levels
        self.index = tunable.index.clone()
        self.changes = [torch.zeros_like(one, requires_grad=True) for one in tunable.parameters]
        self._coefficients = self._computed()
        self._offset = torch.empty_like(self.index, dtype=torch.int16)
        for number in range(len(self.index)):
            self._offset[number] = self._start(number, original(number))
        self._adam = Moments(self.index.shape, self.index.device) if adam else None
        self._step = 0.0
        self._sums = self._zeros()
        self._best: tuple[Tensor, list[Tensor]] | None = None

    def weight(self, part: slice) -> Tensor:
        """See `Matrices.weight`."""
        multiplier, addend = self._numbers(part)
        return decode(self.index[part], self._levels, multiplier, addend, self._dtype)

    def begin(self, step: float) -> None:
        """An update begins, in which codes move at most by ``step``; 0: none begins, only `weight` will be asked."""
        self._step = step
        self._coefficients = self._computed()
        self._sums = self._zeros()
        if self._adam is not None and step:
            self._adam.count += 1

    def take(self, part: slice, gradient: Tensor) -> None:
        """See `Matrices.take`: moves the codes at once."""
        multiplier, _ = self._numbers(part)
        index, offset = self.index[part], self._offset[part]
        if self._adam is None:
            sums = update(index, offset, self._levels, multiplier, gradient, self._step)
        else:
            grouped, sums = group_sums(index, self._levels, multiplier.shape[-1], gradient)
            distance = self._adam.step(part, (grouped * multiplier.unsqueeze(-1)).flatten(-2), self._step)
            move(index, offset, distance.mul_(ONE).round_(), len(self._levels) - 1)
        for total, own in zip(self._sums, sums, strict=True):
            total[part] += own

    def finish(self) -> None:
        """All gradients are taken: those of ``changes``."""
        multiplier, addend = self._coefficients
        if not multiplier.requires_grad:
            return
        given = [multiplier] if addend is None else [multiplier, addend]
        torch.autograd.backward(given, list(self._sums[: len(given)]))

    def keep(self) -> None:
        """Remember this state as the best."""
        self._best = self.index.clone(), [one.detach().clone() for one in self.changes]

    def result(self) -> tuple[Stored, int]:
        """What is stored in the best state, and how many codes changed."""
        assert self._best is not None, "no state was kept"
        index, changes = self._best
        changed = int((index != self._tunable.index).sum())
        return self._tunable.stored(index, self._parameters(changes)), changed

    def restore(self) -> None:
        """Go back to the best state."""
        assert self._best is not None, "no state was kept"
        self.index, changes = self._best
        with torch.no_grad():
            for one, best in zip(self.changes, changes, strict=True):
                one.copy_(best)
        self._coefficients = self._computed()

    def _parameters(self, changes: list[Tensor]) -> tuple[Tensor, ...]:
        pairs = zip(self._tunable.parameters, changes, strict=True)
        return self._tunable.nearest(tuple(start * (1 + change) for start, change in pairs))

    def _computed(self) -> tuple[Tensor, Tensor | None]:
        """Coefficients of the parameters that would be stored; gradients pass the rounding."""
        with torch.enable_grad():
            wanted = tuple(p * (1 + c) for p, c in zip(self._tunable.parameters, self.changes, strict=True))
            nearest = self._tunable.nearest(tuple(one.detach() for one in wanted))
            through = tuple(one + (near - one.detach()) for one, near in zip(wanted, nearest, strict=True))
            return self._tunable.coefficients(through)

    def _numbers(self, part: slice) -> tuple[Tensor, Tensor | None]:
        multiplier, addend = self._coefficients
        return multiplier.detach()[part], None if addend is None else addend.detach()[part]

    def _zeros(self) -> tuple[Tensor, Tensor]:
        multiplier = self._coefficients[0].detach()
        return torch.zeros_like(multiplier), torch.zeros_like(multiplier)

    def _start(self, number: int, original: Tensor) -> Tensor:
        """(out, in) int16: the method's codes, each leaning towards the original weight."""
        part = slice(number, number + 1)
        multiplier, addend = (None if one is None else one[0].unsqueeze(-1) for one in self._numbers(part))
        assert multiplier is not None
        whole = original.reshape(-1, *self.index.shape[1:])
        wanted = whole[number if len(whole) > 1 else 0].float().unflatten(-1, (multiplier.shape[-2], -1))
        wanted = wanted if addend is None else wanted - addend
        index = self.index[number]
        own = self._levels[index.int()].view(wanted.shape)
        wanted = torch.where(multiplier == 0, own, wanted / multiplier.masked_fill(multiplier == 0, 1.0))
        return nearest_offset(index, self._levels, wanted.flatten(-2), CLIP)
