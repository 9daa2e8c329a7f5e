"""A choice written as rules: one for each projection, type and ten layers at most, so that V3 takes some hundred."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.plan.recipe import Rule
from quantkit.schemes import ChosenScheme
from quantkit.tensors import TensorSpec

Assigned = Iterable[tuple[TensorSpec, ChosenScheme | None]]
"""Tensors and what they are stored in; None: kept in bfloat16."""


def rules_of(assigned: Assigned) -> tuple[Rule, ...]:
    """Rules that give each of these tensors its scheme, and match no other tensor of the model."""
    layers: dict[tuple[str, str], tuple[ChosenScheme | None, set[int | None]]] = {}
    for spec, scheme in assigned:
        key = (_template(spec), "" if scheme is None else scheme.label)
        layers.setdefault(key, (scheme, set()))[1].add(spec.layer)
    return tuple(
        _rule(template.format(glob), scheme)
        for (template, _), (scheme, found) in layers.items()
        for glob in layer_globs([layer for layer in found if layer is not None]) or [""]
    )


def _rule(match: str, scheme: ChosenScheme | None) -> Rule:
    if scheme is None:
        return Rule.model_validate({"match": match, "keep": "bf16"})
    said = {"kind": scheme.kind, **scheme.model_dump(mode="json", exclude_unset=True)}
    return Rule.model_validate({"match": match, "scheme": said})


def _template(spec: TensorSpec) -> str:
    """The name with {} for the layer's number and * for the expert's."""
    name = spec.name.replace("{", "{{").replace("}", "}}")
    if spec.layer is not None:
        name = name.replace(f".{spec.layer}.", ".{}.", 1)
    return name if spec.expert is None else _last(name, f".{spec.expert}.", ".*.")


def _last(text: str, old: str, new: str) -> str:
    before, _, after = text.rpartition(old)
    return f"{before}{new}{after}"


def layer_globs(layers: Sequence[int]) -> list[str]:
    """Globs that together match exactly these numbers: one for each ten."""
    tens: dict[int, list[int]] = {}
    for layer in sorted(layers):
        tens.setdefault(layer // 10, []).append(layer % 10)
    return [f"{ten or ''}{_digits(digits)}" for ten, digits in tens.items()]


def _digits(digits: list[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    whole = len(digits) > 2 and digits[-1] - digits[0] == len(digits) - 1
    return f"[{digits[0]}-{digits[-1]}]" if whole else f"[{''.join(map(str, digits))}]"


def ranges(layers: Iterable[int]) -> str:
    """ "0, 3-5" for people."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
