"""The part of a plan that a trial carries out: some layers, quantised as in the whole conversion. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from quantkit.arch.base import ModelArch
from quantkit.errors import PlanError
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.schedule import AFTER_LAYERS, FILES, PASSING, VALIDATION, Cost, Schedule, Step


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers of "0-4,10", rising, each once. Raises `ValueError` with what was found and needed."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or len(part) > 12:
            raise ValueError(f"found {text[:40]!r}, needed layers such as 3, 0-4 or 0-4,10")
        low, high = int(first), int(last) if dash else int(first)
        if not low <= high < 10_000:
            raise ValueError(f"found {part.strip()[:40]!r}, needed a range that rises")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def trial_plan(plan: Plan, layers: tuple[int, ...], arch: ModelArch) -> Plan:
    """What of a plan lies in these layers. Its sizes are left out: the output is no checkpoint. Raises `PlanError` for
    layers that the model has not, and for MTP layers."""
    last = arch.n_layers - 1
    if not layers or layers[0] < 0 or layers[-1] > last:
        beyond = next((layer for layer in layers if not 0 <= layer <= last), "none")
        mtp = " (an MTP layer, which is no part of trials)" if beyond in arch.mtp_layers() else ""
        raise PlanError(f"layers: found {beyond}{mtp}, the model has decoder layers 0 to {last}.")
    return replace(plan, outputs=tuple(_part(output, frozenset(layers)) for output in plan.outputs))


def _part(output: OutputPlan, layers: frozenset[int]) -> OutputPlan:
    decisions = {name: d for name, d in output.decisions.items() if d.spec.layer in layers}
    planned = tuple(tensor for tensor in output.planned if tensor.name in decisions)
    return replace(output, decisions=decisions, planned=planned, sizes=())


def trial_schedule(whole: Schedule, layers: tuple[int, ...], outputs: int, passed: float) -> Schedule:
    """The steps of a trial, of those of the whole conversion. ``passed``: how many times the text of the validation,
    through both models, goes through a layer that is only passed."""
    last = layers[-1]
    compared = {step.layer: step for step in whole if step.kind == VALIDATION}

    def steps() -> Iterator[Step]:
        for layer in range(last + 1):
            if layer in layers:
                yield from (step for step in whole if step.layer == layer and step.kind not in AFTER_LAYERS)
            elif layer in compared:
                yield Step(PASSING, layer, Cost(passed * compared[layer].cost.computing))
        for _ in range(outputs):
            yield Step(FILES, None, Cost())
            yield from (compared[layer] for layer in range(last + 1) if layer in compared)

    return tuple(steps())
