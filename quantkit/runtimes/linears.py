"""The linears of a planned folder as runtimes look at them: by scheme, routed experts apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quantkit.formats.layouts.compressed_tensors_config import KEPT, is_module, numbered_schemes
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import Scheme, describe

Tensors = list[PlannedTensor]


@dataclass(frozen=True, slots=True)
class Use:
    """A scheme and the linears that have it; ``experts`` are those of them that are routed experts."""

    scheme: Scheme
    tensors: Tensors
    experts: Tensors


@dataclass(frozen=True, slots=True)
class LinearsByScheme:
    """All linears of a plan: ``uses`` in order of the schemes' first appearance, ``kept`` what is not quantised."""

    uses: tuple[Use, ...]
    kept: Tensors


Check = Callable[[LinearsByScheme], Iterator[str]]
"""Gives one line for each thing that a runtime will not take, or takes only in part."""


def by_scheme(planned: Sequence[PlannedTensor]) -> LinearsByScheme:
    """Sort a plan's linears."""
    schemes, keys = numbered_schemes(tensor.scheme for tensor in planned)
    found: dict[int, Tensors] = {}
    for tensor, key in zip(planned, keys, strict=True):
        if is_module(tensor):
            found.setdefault(key, []).append(tensor)
    kept = found.pop(KEPT, [])
    uses = (Use(schemes[key], own, [t for t in own if t.expert is not None]) for key, own in found.items())
    return LinearsByScheme(tuple(uses), kept)


def line(tensors: Tensors, text: str) -> str:
    """The first tensor, how many more there are, their scheme, and what is to be said of them."""
    more = f" and {len(tensors) - 1:,} more" if len(tensors) > 1 else ""
    return f"{tensors[0].module}{more} ({describe(tensors[0].scheme)}): {text}"
