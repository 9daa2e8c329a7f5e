"""The linears of a layer as tuning moves them, made of what a method gave, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from quantkit.arch.base import LinearPart
from quantkit.convert.outputs import Quantised
from quantkit.convert.weights import LayerWeights
from quantkit.tuning.linears import FixedMatrices, Matrices, TunedMatrices


@dataclass(frozen=True, slots=True)
class TunedLinears:
    """``dense``: linears and parts by name, each with its shape; ``fixed``: those whose scheme nothing can be tuned of,
    decoded; ``experts``: where each expert's linear is; ``made``: of which `Quantised` each of the moving matrices
    is."""

    dense: dict[str, tuple[TunedMatrices, tuple[int, ...]]] = field(
        default_factory=dict[str, tuple[TunedMatrices, tuple[int, ...]]]
    )
    fixed: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    experts: dict[str, tuple[Matrices, int]] = field(default_factory=dict[str, tuple[Matrices, int]])
    made: dict[int, TunedMatrices] = field(default_factory=dict[int, TunedMatrices])

    @property
    def moving(self) -> tuple[TunedMatrices, ...]:
        """All matrices that move."""
        return tuple(self.made.values())

    @property
    def codes(self) -> int:
        """How many there are."""
        return sum(one.index.numel() for one in self.moving)

    def replaced(self, held: Sequence[Quantised]) -> tuple[list[Quantised], int]:
        """What is stored after tuning, and how many codes changed."""
        results, changed = list(held), 0
        for number, matrices in self.made.items():
            stored, own = matrices.result()
            made = held[number]
            results[number] = replace(made, batch=replace(made.batch, stored=stored))
            changed += own
        return results, changed

    def expert(self, name: str, otherwise: Callable[[str], Tensor]) -> Tensor:
        """The weight (out, in) of an expert's linear as it is now; of another linear what ``otherwise`` gives."""
        if name not in self.experts:
            return otherwise(name)
        matrices, number = self.experts[name]
        return matrices.weight(slice(number, number + 1))[0]


def tuned_linears(
    held: Sequence[Quantised],
    weights: LayerWeights,
    parts: Mapping[str, LinearPart],
    experts: tuple[tuple[str, ...], ...],
    *,
    adam: bool,
) -> TunedLinears:
    """Of everything that was made of a layer. ``experts``: names of each projection of its routed experts."""
    found, routed = TunedLinears(), {name for names in experts for name in names}
    weights.expect([name for made in held for name in made.names if name in routed])
    for number, made in enumerate(held):
        dtype = weights.dtype(weights.whole_of(made.names[0]))
        tunable = made.batch.scheme.tunable(made.batch.stored)
        if tunable is None:
            values = made.batch.decode().to(dtype)
            matrices: Matrices = FixedMatrices(values)
        else:
            matrices = TunedMatrices(tunable, partial(_original, weights, made.names), dtype, adam=adam)
            found.made[number] = matrices
        if made.names[0] in routed:
            found.experts.update((name, (matrices, place)) for place, name in enumerate(made.names))
            continue
        (name,) = made.names
        shape = parts[name].shape if name in parts else weights.shape(name)
        if isinstance(matrices, TunedMatrices):
            found.dense[name] = matrices, shape
        else:
            found.fixed[name] = matrices.weight(slice(None)).view(shape)
    for names in experts:
        _keep_others(found, names, weights)
    return found


def _original(weights: LayerWeights, names: tuple[str, ...], number: int) -> Tensor:
    """The weight that matrix ``number`` was made of. One name has several matrices, its heads, one under the other."""
    name = names[number if len(names) > 1 else 0]
    return weights.read(name)


def _keep_others(found: TunedLinears, names: tuple[str, ...], weights: LayerWeights) -> None:
    """Experts of a projection that nothing was made of have their original weights."""
    for known, run in groupby(names, key=found.experts.__contains__):
        if known:
            continue
        kept = list(run)
        values = [weights.from_source(name).to(weights.device, weights.dtype(name)) for name in kept]
        matrices = FixedMatrices(torch.stack(values))
        found.experts.update((name, (matrices, place)) for place, name in enumerate(kept))
