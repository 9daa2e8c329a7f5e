"""Routed experts inside autograd: forward over tokens sorted by expert, and a backward that is written out. It decodes
a group of experts at a time, and hands the gradients of their weights on at once, so that those of all experts never
exist together.

    y[t] = sum over the experts e of token t of  share[t, e] * down_e(activate(gate_e x[t], up_e x[t]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.stream import Activate
from quantkit.tuning.linears import Matrices


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """Some matrices among those of a batch."""

    matrices: Matrices
    part: slice

    def weight(self) -> Tensor:
        """(b, out, in)."""
        return self.matrices.weight(self.part)

    def take(self, gradient: Tensor) -> None:
        """The gradient at them."""
        self.matrices.take(self.part, gradient)


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts [first, stop) of a block, decoded together."""

    first: int
    stop: int
    gate: ExpertPlace
    up: ExpertPlace
    down: ExpertPlace


@dataclass(frozen=True, slots=True)
class TunedExperts:
    """All routed experts of a block. ``dtype``: of its arithmetic."""

    activate: Activate
    groups: tuple[ExpertGroup, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """How many."""
        return self.groups[-1].stop

    def __call__(self, h: Tensor, shares: Tensor, indices: Tensor) -> Tensor:
        """h (tokens, hidden), shares and indices (tokens, top_k): the gate weights and which experts -> what they add
        (tokens, hidden) float32, or float64."""
        out = _Routed.apply(h, shares, indices, self)
        assert isinstance(out, Tensor)
        return out


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Pairs of token and expert, sorted by expert. ``order``: pair (token * top_k + slot) of each; ``bounds``: of each
    expert's run."""

    order: Tensor
    top_k: int
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, indices: Tensor, n_experts: int) -> _Sorted:
        flat = indices.flatten()
        counts = torch.bincount(flat, minlength=n_experts)
        return cls(flat.argsort(stable=True), indices.shape[1], (0, *counts.cumsum(0).tolist()))

    @property
    def tokens(self) -> Tensor:
        return self.order.div(self.top_k, rounding_mode="floor")

    def back(self, values: Tensor) -> Tensor:
        """(pairs, ...) -> (tokens, top_k, ...) in the order of the tokens: sums then have one order."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place), device=place.device)
        return values[place].unflatten(0, (-1, self.top_k))

    def run(self, first: int, stop: int) -> slice:
        """Pairs of experts [first, stop)."""
        return slice(self.bounds[first], self.bounds[stop])

    def each(self, group: ExpertGroup) -> Iterator[tuple[int, slice]]:
        """Place in the group, and pairs, of each expert that has some."""
        for expert in range(group.first, group.stop):
            if self.bounds[expert + 1] > self.bounds[expert]:
                yield expert - group.first, self.run(expert, expert + 1)


class _Routed(torch.autograd.Function):
    """`TunedExperts` as autograd sees it. The weights are no inputs: their gradients go to `ExpertPlace.take`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, shares: Tensor, indices: Tensor, experts: TunedExperts) -> Tensor:
        pairs = _Sorted.of(indices, experts.count)
        x = h.to(experts.dtype)[pairs.tokens]
        given = shares.flatten()[pairs.order].unsqueeze(1)
        gates, ups, out = _forward(experts, pairs, x)
        ctx.experts, ctx.pairs, ctx.h_dtype = experts, pairs, h.dtype
        ctx.save_for_backward(x, given, gates, ups)
        return pairs.back(out.to(given.dtype) * given).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        experts, pairs = ctx.experts, ctx.pairs
        x, given, gates, ups = ctx.saved_tensors
        into, of_share = _backward(experts, pairs, _Saved(x, given, gates, ups), gradients[0])
        return pairs.back(into).sum(1, dtype=given.dtype).to(ctx.h_dtype), pairs.back(of_share), None, None


def _forward(experts: TunedExperts, pairs: _Sorted, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of all gates, ups and downs (pairs, width)."""
    gates, ups, out = x.new_empty(0), x.new_empty(0), torch.empty_like(x)
    for group in experts.groups:
        gate, up = group.gate.weight(), group.up.weight()
        if not gates.numel():
            gates, ups = x.new_empty(len(x), gate.shape[1]), x.new_empty(len(x), up.shape[1])
        _products(pairs, group, x, gate.mT, gates)
        _products(pairs, group, x, up.mT, ups)
        run = pairs.run(group.first, group.stop)
        hidden = torch.empty_like(gates[run])
        if hidden.numel():
            hidden = experts.activate(gates[run], ups[run])
        del gate, up
        _products(pairs, group, hidden, group.down.weight().mT, out, run.start)
    return gates, ups, out


@dataclass(frozen=True, slots=True)
class _Saved:
    """Of the forward pass, by pairs: inputs, gate weights (pairs, 1), and outputs of gates and ups."""

    x: Tensor
    share: Tensor
    gates: Tensor
    ups: Tensor


def _backward(experts: TunedExperts, pairs: _Sorted, saved: _Saved, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """gradient (tokens, hidden) at the sum -> at what each pair reads (pairs, hidden), and at its gate weight."""
    at_out = gradient.to(experts.dtype)[pairs.tokens]
    weighted = at_out * saved.share.to(at_out.dtype)
    into, of_share = torch.empty_like(saved.x), torch.zeros_like(saved.share[:, 0])
    for group in experts.groups:
        run = pairs.run(group.first, group.stop)
        if run.start == run.stop:
            continue
        unweighted = torch.empty_like(saved.gates[run])
        _products(pairs, group, at_out[run], group.down.weight(), unweighted, run.start, run.start)
        gate_up = [values[run].detach().requires_grad_() for values in (saved.gates, saved.ups)]
        with torch.enable_grad():
            hidden = experts.activate(*gate_up)
        own = unweighted * saved.share[run].to(unweighted.dtype)
        at_gates, at_ups = torch.autograd.grad(hidden, gate_up, own)
        of_share[run] = (hidden.detach().to(of_share.dtype) * unweighted.to(of_share.dtype)).sum(-1)
        gate, up = group.gate.weight(), group.up.weight()
        for number, one in pairs.each(group):
            local = slice(one.start - run.start, one.stop - run.start)
            torch.mm(at_gates[local], gate[number], out=into[one])
            into[one].addmm_(at_ups[local], up[number])
        del gate, up
        _take(group.down, pairs, group, weighted[run], hidden.detach())
        _take(group.gate, pairs, group, at_gates, saved.x[run])
        _take(group.up, pairs, group, at_ups, saved.x[run])
    return into, of_share


def _products(
    pairs: _Sorted, group: ExpertGroup, x: Tensor, weight: Tensor, out: Tensor, x_start: int = 0, out_start: int = 0
) -> None:
    """Each expert's pairs of x times its weight (b, in, out). ``x_start``, ``out_start``: pair of the first row."""
    for number, one in pairs.each(group):
        rows, into = (slice(one.start - start, one.stop - start) for start in (x_start, out_start))
        torch.mm(x[rows], weight[number], out=out[into])


def _take(place: ExpertPlace, pairs: _Sorted, group: ExpertGroup, at_out: Tensor, x: Tensor) -> None:
    """The gradients of one projection: at_out (pairs, out), x (pairs, in) of the group alone."""
    if not place.matrices.moves:
        return
    gradient = x.new_zeros(group.stop - group.first, at_out.shape[1], x.shape[1])
    start = pairs.bounds[group.first]
    for number, one in pairs.each(group):
        local = slice(one.start - start, one.stop - start)
        torch.mm(at_out[local].mT, x[local], out=gradient[number])
    place.take(gradient)


def groups_of(
    placed: Callable[[int], tuple[tuple[Matrices, int], ...]], n_experts: int, at_once: int
) -> tuple[ExpertGroup, ...]:
    """``placed(e)``: where gate, up and down of expert e are. Runs of experts whose matrices follow one another, of at
    most ``at_once``."""
    groups: list[ExpertGroup] = []
    first = 0
    for expert in range(1, n_experts + 1):
        if expert < n_experts and expert - first < at_once and _follows(placed(expert - 1), placed(expert)):
            continue
        places = (ExpertPlace(one, slice(n, n + expert - first)) for one, n in placed(first))
        groups.append(ExpertGroup(first, expert, *places))
        first = expert
    return tuple(groups)


def _follows(before: tuple[tuple[Matrices, int], ...], after: tuple[tuple[Matrices, int], ...]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(own is next_ and number + 1 == next_number for (own, number), (next_, next_number) in pairs)
