"""Lists of kept modules, for readers that take a module for listed if an entry is part of its name."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.formats.layouts.compressed_tensors_config import ALWAYS_IGNORED, is_module
from quantkit.formats.planned import PlannedTensor
from quantkit.tensors import Role


def kept_modules(planned: Sequence[PlannedTensor]) -> list[str]:
    """Names of modules that are not quantised; a block without any quantised expert under its own name."""
    quantised = {_block(tensor) for tensor in planned if tensor.scheme is not None}
    modules = (t for t in planned if t.scheme is None and is_module(t))
    names = (_block(t) if _block(t) not in quantised else t.module for t in modules)
    carried = (tensor.name.partition(".")[0] for tensor in planned if tensor.role is Role.VISION)
    return list(dict.fromkeys([ALWAYS_IGNORED, *names, *carried]))


def wrongly_kept(planned: Sequence[PlannedTensor], layout: str) -> list[str]:
    """One line for each entry of the list that is part of a quantised module's name."""
    quantised = [tensor.module for tensor in planned if tensor.scheme is not None]
    found: list[str] = []
    for kept in kept_modules(planned):
        hit = next((module for module in quantised if kept in module), None)
        if hit is not None:
            found.append(
                f"{kept} is kept, but readers of {layout} would leave {hit} out with it; quantise both or none."
            )
    return found


def _block(tensor: PlannedTensor) -> str:
    """model.layers.3.mlp.experts of one of its experts; any other module itself."""
    return tensor.module if tensor.expert is None else tensor.module.rpartition(f".{tensor.expert}.")[0]
