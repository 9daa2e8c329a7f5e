"""The tensors of a model as GGUF lists them: parts of linears, and the experts of a layer stacked into one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from quantkit.arch.base import GgufModel, LinearPart, ModelArch
from quantkit.tensors import TensorSpec, stacked_shape


def in_parts(arch: ModelArch) -> tuple[TensorSpec, ...]:
    """The family's tensors, linears with parts replaced by these."""
    parts: dict[str, list[LinearPart]] = {}
    for part in arch.parts().values():
        parts.setdefault(part.whole, []).append(part)
    specs: list[TensorSpec] = []
    for spec in arch.tensors():
        own = parts.get(spec.name)
        specs += (
            [replace(spec, name=part.name, shape=part.shape, part_of=part.whole) for part in own] if own else [spec]
        )
    return tuple(specs)


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor of a GGUF file. ``shape`` in numpy's order; ``first``: the tensor that it holds, or the first of the
    experts that are stacked in it."""

    name: str
    shape: tuple[int, ...]
    first: TensorSpec
    stacked: bool

    @property
    def n_matrices(self) -> int:
        """Experts, or heads of a part, that the tensor holds; 1 for a matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1


def stored_tensors(specs: Iterable[TensorSpec], model: GgufModel, n_experts: int | None = None) -> dict[str, GgufEntry]:
    """Tensors of a file by GGUF name, in order of first appearance. ``specs``: as of `in_parts`.

    ``n_experts``: of each stacked tensor, if it is not the number of experts among ``specs``.
    """
    first: dict[str, tuple[TensorSpec, int | None]] = {}
    experts: dict[str, int] = {}
    for spec in specs:
        name, expert = model.stored_name(spec.name)
        first.setdefault(name, (spec, expert))
        experts[name] = experts.get(name, 0) + 1
    return {
        name: GgufEntry(name, stacked_shape(spec.shape, expert, n_experts or experts[name]), spec, expert is not None)
        for name, (spec, expert) in first.items()
    }
