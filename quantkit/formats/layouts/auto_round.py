"""Reads what auto-round writes under its own ``quant_method``: the tensors are those of GPTQ or AWQ, as its
``packing_format`` says, only config.json has words of its own.

``extra_config`` names linears, or patterns that are searched for in their names, with other settings than the rest;
16 bits stand for not quantised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderReader, PackedLinear, object_of
from quantkit.formats.layouts.awq_reader import AWQ_READER
from quantkit.formats.layouts.gptq_reader import GPTQ_READER
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource

METHOD = "auto-round"
_UNQUANTISED_BITS = 16
_PATTERN = frozenset("*+?^$()[]{}|\\")
"""Signs by which readers tell a pattern from a name."""
_PACKINGS: Mapping[object, tuple[str, FolderReader]] = {
    "auto_round:auto_gptq": ("gptq", GPTQ_READER),
    "auto_round:auto_awq": ("awq", AWQ_READER),
}


def equivalent(where: str, section: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """The ``quant_method`` "gptq" or "awq", and the section that says the same in its words. ``where``: the file, for
    messages. Raises `SourceError` for another packing, and for entries that are malformed."""
    method, _ = _packing(where, section)
    common = {key: section[key] for key in ("bits", "group_size", "sym") if key in section}
    entries = object_of(where, "extra_config", section.get("extra_config") or {})
    dynamic = dict(_dynamic(where, name, value) for name, value in entries.items())
    return method, {**common, "quant_method": method, "desc_act": False, "dynamic": dynamic}


def _packing(where: str, section: Mapping[str, object]) -> tuple[str, FolderReader]:
    name = section.get("packing_format", "auto_round:auto_gptq")
    found = _PACKINGS.get(name) if isinstance(name, str) else None
    if found is None:
        known = " or ".join(map(repr, _PACKINGS))
        raise SourceError(f"{where}: packing_format is {printable(repr(name))}, {known} was needed.")
    return found


def _dynamic(where: str, name: str, value: object) -> tuple[str, dict[str, object]]:
    """An entry of ``extra_config`` as GPTQ's "dynamic" has it, whose patterns match from the start."""
    entry = object_of(where, f"extra_config.{printable(name)}", value)
    pattern = f".*(?:{name})" if _PATTERN & set(name) else f"{re.escape(name)}$"
    bits = entry.get("bits")
    if isinstance(bits, int) and bits >= _UNQUANTISED_BITS:
        return f"-:{pattern}", {}
    return f"+:{pattern}", {key: entry[key] for key in ("bits", "group_size", "sym") if key in entry}


def _find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    where = str(raw.directory / "config.json")
    _, said = equivalent(where, section)
    return _packing(where, section)[1].find(raw, said)


AUTO_ROUND_READER = FolderReader("auto-round", _find)
