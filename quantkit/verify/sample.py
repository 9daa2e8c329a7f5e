"""Linears decoded from the files, values and all: they are finite, not blank, and near the original if it is at
hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.arch.base import ModelArch
from quantkit.errors import QuantkitError
from quantkit.evaluate.open import open_candidate, open_reference
from quantkit.tensors import Role, RowSource

if TYPE_CHECKING:
    from torch import Tensor

FARTHEST = 0.8
"""Relative distance, in the Frobenius norm, of a linear from its original. Two bits leave 0.5 at most; another linear
of the same norm is at 1.4, one with its rows or columns in another order too."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """``faults``: a line for each linear that cannot be right; ``decoded``: how many were; ``compared``: how many of
    these with the original."""

    faults: tuple[str, ...]
    decoded: int
    compared: int


def decode_sample(
    path: Path, arch: ModelArch, count: int, original: Path | None, origins: Mapping[str, str]
) -> Sampled:
    """Decode ``count`` linears of a checkpoint of any format, drawn with a fixed seed, all of them if there are fewer.
    ``original``: the folder that it was made of, ``origins``: names there that are others. Raises `QuantkitError` for a
    checkpoint that cannot be opened."""
    names = [spec.name for spec in arch.tensors() if spec.linear and spec.role is not Role.MTP]
    drawn = sorted(random.Random(0).sample(names, min(count, len(names))))
    with ExitStack() as stack:
        made = stack.enter_context(open_candidate(path, arch, None)).source
        source = None if original is None else stack.enter_context(open_reference(original)).source
        faults = tuple(_faults(made, source, drawn, origins))
    return Sampled(faults, len(drawn), 0 if source is None else len(drawn))


def _faults(
    made: RowSource, source: RowSource | None, names: Sequence[str], origins: Mapping[str, str]
) -> Iterator[str]:
    for name in names:
        try:
            weight = made.read(name).float()
        except QuantkitError as error:
            yield error.message
            continue
        problem = _problem(weight, None if source is None else source.read(origins.get(name, name)).float())
        if problem:
            yield f"{name}: {problem}"


def _problem(weight: Tensor, original: Tensor | None) -> str:
    if not weight.isfinite().all():
        return "decodes to values that are no numbers."
    blank = int((weight == 0).all(dim=1).sum())
    if original is None:
        return f"{blank:,} of {len(weight):,} rows decode to zeros." if blank > len(weight) // 2 else ""
    distance = float((weight - original).norm() / original.norm().clamp_min(1e-30))
    if distance <= FARTHEST:
        return ""
    return f"is {distance:.2f} of its norm away from the original's: another tensor, or in another order."
