"""Linears whose method asks for gains of rows that their types cannot store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from quantkit.plan.decide import Decision
from quantkit.quantizers.row_gains import takes_row_gains


def without_row_gains(decisions: Iterable[Decision]) -> Iterator[str]:
    """A line for each type whose linears stay without, although their method has row_gains."""
    found: dict[str, list[Decision]] = {}
    for decision in decisions:
        chosen = decision.quantising
        if chosen is not None and chosen[1].row_gains and not takes_row_gains(chosen[0]):
            found.setdefault(chosen[0].label, []).append(decision)
    for label, linears in found.items():
        yield (
            f"{len(linears):,} linears, such as {linears[0].spec.name}, get no row_gains: scales of {label} cannot "
            "take them."
        )
