"""Errors of linears by layer and projection, tokens of experts by layer: tens of thousands of records -> what fits on a
page. Names are those of the checkpoint; only "layers.N." and "experts.N." in them mean something here."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quantkit.documents.conversion import ConversionDocument, LinearRecord
from quantkit.documents.evaluation import Result

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.(.+)$")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,9})\.")
_KINDS = (("self_attn.", "attention "), ("mlp.shared_experts.", "shared "), ("mlp.", "dense "))


class LinearPlace(NamedTuple):
    """Where a linear sits. ``layer`` is None outside the decoder layers, ``expert`` for what is no routed expert."""

    layer: int | None
    projection: str
    expert: int | None


def place_of(name: str) -> LinearPlace:
    """ "model.layers.3.mlp.experts.17.gate_proj.weight" -> (3, "expert gate", 17)."""
    found = _LAYER.search(name)
    if found is None:
        return LinearPlace(None, _short(name.removeprefix("model.")), None)
    layer, inside = int(found[1]), found[2]
    expert = _EXPERT.search(inside)
    if expert is not None:
        return LinearPlace(layer, "expert " + _short(inside[expert.end() :]), int(expert[1]))
    return LinearPlace(layer, _short(inside), None)


def _short(name: str) -> str:
    base, _, part = name.partition(":")
    base = base.removesuffix(".weight").replace("_proj", "").replace("_with_mqa", "")
    for prefix, kind in _KINDS:
        if base.startswith(prefix):
            base = kind + base.removeprefix(prefix)
            break
    return f"{base} {part}".strip()


@dataclass(frozen=True, slots=True)
class Cell:
    """Relative losses of the linears of one projection in one layer (one, or one for each expert). ``largest_expert``:
    whose is the largest; ``stored_as``: the schemes; ``weighed``: the median of the losses that output-aware methods
    lower, None without them."""

    count: int
    median: float
    p90: float
    largest: float
    largest_expert: int | None
    fallbacks: int
    stored_as: str
    weighed: float | None = None


@dataclass(frozen=True, slots=True)
class ErrorGrid:
    """Cells by (layer, projection). Layers ascend, projections come in the order of the work. ``outside``: what is in
    no layer; ``calibrated``: whether some linear saw tokens; ``blind``: layers of which none did."""

    layers: tuple[int, ...]
    projections: tuple[str, ...]
    cells: Mapping[tuple[int, str], Cell]
    outside: Mapping[str, Cell]
    calibrated: bool
    blind: tuple[int, ...]

    @property
    def output_aware(self) -> bool:
        """Whether some linear was quantised by what its error does to the model's loss."""
        return any(cell.weighed is not None for cell in self.cells.values())


def error_grid(document: ConversionDocument) -> ErrorGrid:
    """Cells for all linears that the conversion quantised."""
    members: dict[tuple[int | None, str], list[tuple[int | None, LinearRecord]]] = {}
    seen: set[int | None] = set()
    for name, linear in document.tensors.items():
        if linear.relative_loss is None or math.isnan(linear.relative_loss):
            continue
        place = place_of(name)
        members.setdefault((place.layer, place.projection), []).append((place.expert, linear))
        if linear.n_tokens:
            seen.add(place.layer)
    cells = {key: _cell(linears) for key, linears in members.items()}
    layers = tuple(sorted({layer for layer, _ in cells if layer is not None}))
    return ErrorGrid(
        layers=layers,
        projections=tuple(dict.fromkeys(projection for layer, projection in cells if layer is not None)),
        cells={(layer, projection): cell for (layer, projection), cell in cells.items() if layer is not None},
        outside={projection: cell for (layer, projection), cell in cells.items() if layer is None},
        calibrated=bool(seen),
        blind=tuple(layer for layer in layers if layer not in seen),
    )


def _cell(linears: Sequence[tuple[int | None, LinearRecord]]) -> Cell:
    losses = sorted((linear.relative_loss or 0.0, -1 if expert is None else expert) for expert, linear in linears)
    values = [loss for loss, _ in losses]
    weighed = [linear.output_loss for _, linear in linears if linear.output_loss is not None]
    largest, expert = losses[-1]
    return Cell(
        count=len(values),
        median=statistics.median(values),
        p90=values[min(len(values) - 1, math.ceil(0.9 * len(values)) - 1)],
        largest=largest,
        largest_expert=None if expert < 0 else expert,
        fallbacks=sum(bool(linear.fallback) for _, linear in linears),
        stored_as=", ".join(dict.fromkeys(scheme_label(linear.scheme) for _, linear in linears)),
        weighed=statistics.median(weighed) if weighed else None,
    )


def scheme_label(scheme: Mapping[str, object]) -> str:
    """ "int4 g128", "Q4_K"; the kind of a scheme that this version does not know."""
    match scheme:
        case {"kind": "ggml", "type": str(block)}:
            return block
        case {"kind": "int", "bits": int(bits)}:
            group = scheme.get("group_size")
            return f"int{bits} g{group}" if isinstance(group, int) else f"int{bits} per row"
        case {"kind": str(kind)}:
            return kind
        case _:
            return "unknown"


def worst(document: ConversionDocument, amount: int) -> list[tuple[str, LinearRecord]]:
    """The linears with the largest loss, largest first."""
    known = [
        (linear.relative_loss, name, linear)
        for name, linear in document.tensors.items()
        if linear.relative_loss is not None and not math.isnan(linear.relative_loss)
    ]
    return [(name, linear) for _, name, linear in sorted(known, key=lambda row: (-row[0], row[1]))[:amount]]


# ------------------------------------------------------------------------------------------------------------- experts


@dataclass(frozen=True, slots=True)
class ExpertGrid:
    """Calibration tokens that chose each routed expert: a row for each layer. ``borrowed``: experts that were given
    tokens of others."""

    layers: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    borrowed: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """Tokens of all experts of all layers."""
        return [count for row in self.tokens for count in row]


def expert_grid(document: ConversionDocument) -> ExpertGrid | None:
    """Tokens by layer and expert, None for a conversion without calibration or without routed experts. Blocks of a
    layer follow each other."""
    layers = sorted(layer for layer, blocks in document.expert_tokens.items() if any(blocks.values()))
    if not layers:
        return None
    rows = [[expert for block in document.expert_tokens[layer].values() for expert in block] for layer in layers]
    return ExpertGrid(
        layers=tuple(layers),
        tokens=tuple(tuple(expert.n_tokens for expert in row) for row in rows),
        borrowed=tuple(sum(expert.borrowed > 0 for expert in row) for row in rows),
    )


@dataclass(frozen=True, slots=True)
class ExpertErrors:
    """After one layer, for each routed expert: tokens of the evaluation's text that the reference sends to it, and the
    error of the hidden state over them; NaN without tokens."""

    layer: int
    tokens: tuple[int, ...]
    errors: tuple[float, ...]


def expert_errors(result: Result) -> tuple[ExpertErrors, ...]:
    """Errors of the layers that have them; none in evaluations of version 1."""
    return tuple(
        ExpertErrors(layer.layer, layer.expert_tokens, layer.expert_errors)
        for layer in result.layers
        if layer.expert_tokens and layer.expert_errors and len(layer.expert_tokens) == len(layer.expert_errors)
    )
