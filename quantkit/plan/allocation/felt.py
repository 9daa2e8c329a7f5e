"""Fisher scalars as a choice counts them: those of a pass, and something for experts that its text did not reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantkit.documents.sensitivity import LinearFisher
from quantkit.tensors import Projection, TensorSpec

_Kin = tuple[int | None, Projection | None]
"""A projection of a layer's experts."""


def felt(specs: Iterable[TensorSpec], linears: Mapping[str, LinearFisher]) -> dict[str, float]:
    """Official name -> Fisher scalar of those of a model's tensors that a pass names.

    An expert that no token of the pass reached has the mean of its layer's others: nothing is known of it, and 0 would
    say that any error of it is harmless.
    """
    named = [spec for spec in specs if spec.official in linears]
    unseen = [spec for spec in named if spec.expert is not None and not linears[spec.official].tokens]
    found = {spec.official: linears[spec.official].fisher for spec in named}
    kin: dict[_Kin, list[float]] = {}
    for spec in named:
        if spec.expert is not None and linears[spec.official].tokens:
            kin.setdefault((spec.layer, spec.projection), []).append(linears[spec.official].fisher)
    for spec in unseen:
        others = kin.get((spec.layer, spec.projection), [])
        found[spec.official] = sum(others) / max(1, len(others))
    return found
