"""Where an evaluation got worse: the layer, the expert, the linear.

Three kinds of evidence. The error of the hidden state after each layer, paired by windows. The error of each expert's
tokens against that of its peers in the same layer: a damaged expert stands out there whichever step damaged it. And
relative_loss of each linear as the conversion itself reported it, which sees a weaker quantiser where scores do not
yet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from quantkit.documents.baseline import ConversionLosses
from quantkit.documents.evaluation import Layer, Windows
from quantkit.evaluate.check.statistics import Paired, allowed, of_limit, of_many, paired
from quantkit.evaluate.check.verdict import Check, Limits, percent
from quantkit.formats.safetensors.header import printable

SHOWN = 4
"""Experts or linears in one line."""
PEERS = 8
"""So many of a kind have a median that one of them does not move."""
UNEVEN = 0.1
"""What all of a kind share, they do not share evenly: of the median's log growth this share is spread."""
_EPSILON = 1e-7
"""Added to errors, root of the sum of squares, before their logarithm: nothing is worse by a factor of nothing."""


# -------------------------------------------------------------------------------------------------------------- layers


def layer_check(was: Windows, found: Windows, old: Sequence[Layer], new: Sequence[Layer], limits: Limits) -> Check:
    """The error of the hidden state after each layer. A failure shows the first layer that is worse: later ones inherit
    it."""
    sigmas = of_many(limits.sigmas, len(old))
    pairs = [paired(*values) for values in zip(was.layers, found.layers, strict=True)]
    spread = limits.layer_spread
    bounds = [allowed(pair, sigmas, math.hypot(spread * pair.was, _EPSILON**2)) for pair in pairs]
    worse = [layer for layer, pair in enumerate(pairs) if not pair.change <= bounds[layer]]
    closest = max(range(len(pairs)), key=lambda layer: of_limit(pairs[layer].change, bounds[layer]))
    layer = worse[0] if worse else closest
    detail = _agreement(old[layer], new[layer])
    if len(worse) > 1:
        detail = "; ".join(filter(None, (f"worse after {len(worse)} layers, first here", detail)))
    return Check(
        name="hidden error",
        place=f"after layer {old[layer].layer}",
        was=f"{math.sqrt(max(pairs[layer].was, 0)):.5f}",
        found=f"{math.sqrt(max(pairs[layer].found, 0)):.5f}",
        change=percent(_root_change(pairs[layer], pairs[layer].change)),
        limit=percent(_root_change(pairs[layer], bounds[layer])),
        passed=not worse,
        detail=detail,
    )


def _root_change(pair: Paired, change: float) -> float:
    """Relative, of the root of a mean that moved by ``change``."""
    if not pair.was > 0:
        return math.inf if change else 0.0
    return math.sqrt(max(1 + change / pair.was, 0)) - 1


def _agreement(was: Layer, found: Layer) -> str:
    if was.router_agreement is None or found.router_agreement is None:
        return ""
    return f"router agreement {was.router_agreement:.2%} -> {found.router_agreement:.2%}"


# ------------------------------------------------------------------------------------------------------------- experts


@dataclass(frozen=True, slots=True)
class _Growth:
    """An expert or a linear. ``excess``: log of its growth without that of its peers, ``bound`` of that."""

    name: str
    was: float
    found: float
    excess: float
    bound: float

    @property
    def ratio(self) -> float:
        """The growth as a multiple of its limit: above 1 it is worse than chance."""
        return of_limit(self.excess, self.bound)

    @property
    def change(self) -> str:
        """ "+71.0 %"."""
        return percent(self.found / self.was - 1 if self.was else math.inf)


def expert_check(old: Sequence[Layer], new: Sequence[Layer], limits: Limits) -> Iterator[Check]:
    """The error of each routed expert's tokens, if both sides have it."""
    total = sum(len(layer.expert_errors or ()) for layer in old)
    sigmas = of_many(limits.sigmas, total)
    growths: list[_Growth] = []
    for was, found in zip(old, new, strict=True):
        growths += _experts(was, found, limits, sigmas)
    if growths:
        yield _worst_check("error of an expert's tokens", growths)


def _experts(was: Layer, found: Layer, limits: Limits, sigmas: float) -> Iterator[_Growth]:
    before, after, tokens = was.expert_errors or (), found.expert_errors or (), was.expert_tokens or ()
    growth = {
        expert: math.log(math.hypot(found_error, _EPSILON)) - math.log(math.hypot(was_error, _EPSILON))
        for expert, (was_error, found_error) in enumerate(zip(before, after, strict=True))
        if tokens[expert] > 0
    }
    if len(growth) < PEERS:
        return
    middle = median(growth.values())
    for expert, grown in growth.items():
        own = math.hypot(math.sqrt(2) * limits.expert_spread, limits.expert_tokens / math.sqrt(tokens[expert]))
        bound = sigmas * math.hypot(own, UNEVEN * middle)
        name = f"layer {was.layer} expert {expert}"
        yield _Growth(name, before[expert], after[expert], grown - middle, bound)


def _worst_check(name: str, growths: Sequence[_Growth]) -> Check:
    """One line for all: the worst of those that are beyond chance, or the one that is nearest to its limit."""
    ranked = sorted(growths, key=lambda growth: -growth.ratio)
    worse = [growth for growth in ranked if growth.ratio > 1]
    worst = worse[0] if worse else ranked[0]
    more = [f"{growth.name} {growth.change}" for growth in worse[1:SHOWN]]
    more += [f"{len(worse) - SHOWN} more"] if len(worse) > SHOWN else []
    return Check(
        name=name,
        place=printable(worst.name),
        was=f"{worst.was:.3g}",
        found=f"{worst.found:.3g}",
        change=worst.change,
        limit=percent(math.expm1(min(worst.bound, 700.0))),
        passed=not worse,
        detail=printable(f"also {', '.join(more)}") if more else "",
    )


# ------------------------------------------------------------------------------------------------------------- linears


def loss_checks(was: ConversionLosses, found: ConversionLosses | None, limits: Limits) -> tuple[list[Check], list[str]]:
    """Losses that both conversions reported: the mean of each kind of linear, and single linears -> (checks, notes)."""
    if found is None:
        return [], ["losses of linears were not compared: there is no quantkit.json beside the checkpoint"]
    if was.calibration != found.calibration:
        return [], ["losses of linears were not compared: the calibration differs in more than its seed"]
    # A loss that is no number now is none that passes.
    common = [name for name, loss in was.losses.items() if loss > 0 and not found.losses.get(name, 0) <= 0]
    gone = [name for name, loss in was.losses.items() if loss > 0 and name not in found.losses]
    notes = [f"{len(gone)} linears of the baseline have no loss now, {printable(gone[0])} is the first"] if gone else []
    if not common:
        return [], notes
    kinds: dict[str, list[str]] = {}
    for name in common:
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
    growth = {name: math.log(found.losses[name]) - math.log(was.losses[name]) for name in common}
    by_kind = _kinds(kinds, growth, was, found, limits)
    single = _linears(kinds, growth, was, found, limits)
    return [_worst_check("loss of a kind of linear", by_kind), _worst_check("loss of a linear", single)], notes


def _kinds(
    kinds: Mapping[str, Sequence[str]],
    growth: Mapping[str, float],
    was: ConversionLosses,
    found: ConversionLosses,
    limits: Limits,
) -> list[_Growth]:
    sigmas = of_many(limits.sigmas, len(kinds))
    growths: list[_Growth] = []
    for kind, names in kinds.items():
        spread = math.hypot(limits.kind_spread, limits.member_spread / math.sqrt(len(names)))
        before, after = (_geometric(side, names) for side in (was, found))
        growths.append(
            _Growth(kind, before, after, fmean(map(growth.__getitem__, names)), math.sqrt(2) * sigmas * spread)
        )
    return growths


def _geometric(side: ConversionLosses, names: Sequence[str]) -> float:
    return math.exp(fmean(math.log(side.losses[name]) for name in names))


def _linears(
    kinds: Mapping[str, Sequence[str]],
    growth: Mapping[str, float],
    was: ConversionLosses,
    found: ConversionLosses,
    limits: Limits,
) -> list[_Growth]:
    """Each against the median of its kind if that has enough peers, else against no change."""
    sigmas = of_many(limits.sigmas, len(growth))
    growths: list[_Growth] = []
    for names in kinds.values():
        grown = [growth[name] for name in names]
        peers = len(names) >= PEERS
        middle = median(grown) if peers else 0.0
        own = math.sqrt(2) * (limits.linear_spread if peers else math.hypot(limits.linear_spread, limits.kind_spread))
        for name in names:
            bound = sigmas * math.hypot(own, UNEVEN * middle)
            growths.append(_Growth(name, was.losses[name], found.losses[name], growth[name] - middle, bound))
    return growths
