"""The architectures of GGUF files whose tensors are known, and who knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantkit.formats.gguf.reader import GgufReader
from quantkit.inspect import deepseek2, grouped
from quantkit.tensors import Role


@dataclass(frozen=True, slots=True)
class GgufChecks:
    """``roles``: a file -> the role of a tensor by its GGUF name, None if the architecture has none of that name.
    ``faults``: a line for each thing with which llama.cpp does not load a file, or computes otherwise; ``oddities``:
    these, and what costs."""

    roles: Callable[[GgufReader], Callable[[str], Role | None]]
    faults: Callable[[GgufReader], list[str]]
    oddities: Callable[[GgufReader], list[str]]


KNOWN_GGUF: Mapping[str, GgufChecks] = {
    **dict.fromkeys(deepseek2.FAMILIES, GgufChecks(deepseek2.roles, deepseek2.faults, deepseek2.oddities)),
    **dict.fromkeys(grouped.ARCHITECTURES, GgufChecks(grouped.roles, grouped.faults, grouped.oddities)),
}
"""By general.architecture."""
