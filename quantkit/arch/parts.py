"""The tensors of a model as a format lists them that stores parts of linears."""

from __future__ import annotations

from dataclasses import replace

from quantkit.arch.base import LinearPart, ModelArch
from quantkit.tensors import TensorSpec


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
