"""The layout of compressed-tensors checkpoints: each scheme in one of its formats (`packings`), all else under its own
name.

Read back is what quantkit writes, and checkpoints of other tools in the same formats, several config groups among them.
What cannot be read exactly is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderLayout, FolderReader, PackedLinear, object_of
from quantkit.formats.layouts.compressed_tensors_config import ConfigGroup, Resolver, Targets, quantization_config
from quantkit.formats.layouts.packings import PACKINGS
from quantkit.formats.layouts.refusals import refusal
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BESIDE = ("_scale", "_shape", "_zero_point", "_global_scale")
"""What lies beside the codes of a linear."""
_UNPACKED = ("float8", "mxfp8")
"""Kinds of schemes whose codes have the name of the weight, one to a byte."""

# --- writing ----------------------------------------------------------------------------------------------------------


def _check(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    if scheme.kind not in PACKINGS:
        raise refusal(name, "compressed-tensors", scheme)


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    assert tensor.scheme is not None, f"{tensor.name} is kept"
    return PACKINGS[tensor.scheme.kind].stored(tensor)


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    return PACKINGS[tensor.scheme.kind].pack(tensor)


# --- reading ----------------------------------------------------------------------------------------------------------


def _find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    resolver = resolver_of(str(raw.directory / "config.json"), section)
    stored = raw.infos()
    linears: dict[str, PackedLinear] = {}
    for name, info in stored.items():
        if name.endswith(".weight_packed"):
            owner = name.removesuffix("_packed")
            linears[owner] = _packed_linear(raw, owner, resolver.scheme(owner.removesuffix(".weight")))
        elif name.endswith(".weight") and f"{name}_scale" in stored:
            linears[name] = _plain_linear(raw, info, resolver.scheme(name.removesuffix(".weight")))
        elif not _is_part(name, stored):
            _check_plain(raw, info)
    return linears


def _check_plain(raw: SafetensorsSource, info: TensorInfo) -> None:
    where = f"{raw.path_of(info.name)}: {printable(info.name)}"
    if info.name.endswith((".weight_g_idx", ".weight_global_scale")):
        raise SourceError(f"{where}: this way of storing a linear is not supported.")
    if info.name.endswith(".weight") and info.dtype.startswith(("F8_", "I", "U")):
        raise SourceError(f"{where} is {info.dtype} without a weight_scale.")


def _packed_linear(raw: SafetensorsSource, name: str, scheme: Scheme | None) -> PackedLinear:
    where = f"{raw.path_of(f'{name}_packed')}: {printable(name)}"
    if scheme is None or scheme.kind in _UNPACKED:
        raise SourceError(f"{where} is packed, but {raw.directory / 'config.json'} gives it no scheme of packed codes.")
    if f"{name}_scale" not in raw.infos():
        raise SourceError(f"{where}: weight_packed has no weight_scale beside it.")
    return PACKINGS[scheme.kind].find(raw, name, scheme)


def _plain_linear(raw: SafetensorsSource, info: TensorInfo, scheme: Scheme | None) -> PackedLinear:
    if scheme is None or scheme.kind not in _UNPACKED or info.dtype != "F8_E4M3":
        raise SourceError(
            f"{raw.path_of(info.name)}: {printable(info.name)} is {info.dtype} with a weight_scale, but "
            f"{raw.directory / 'config.json'} gives it no scheme of FP8 blocks and no MXFP8."
        )
    return PACKINGS[scheme.kind].find(raw, info.name, scheme)


def _is_part(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor belongs to a linear that is listed by its weight or its packed codes."""
    for suffix in _BESIDE:
        base = name.removesuffix(suffix)
        if base != name and base.endswith(".weight"):
            return f"{base}_packed" in stored or base in stored
    return False


def resolver_of(where: str, section: Mapping[str, object]) -> Resolver:
    """What a quantization_config says of each module. ``where``: the file, for messages. Raises `SourceError` for
    schemes that quantkit has not, and for patterns that are none."""
    try:
        return Resolver(_targets(where, section))
    except re.error as error:
        raise SourceError(f"{where}: a target or ignore pattern is malformed ({error}).") from error


def _targets(where: str, section: Mapping[str, object]) -> Targets:
    """Groups and ignore list."""
    if section.get("quant_method") != "compressed-tensors":
        raise SourceError(
            f"{where}: quant_method is {printable(repr(section.get('quant_method')))}, compressed-tensors was needed."
        )
    groups = object_of(where, "config_groups", section.get("config_groups"))
    return Targets(
        tuple(_group(f"{where}: config_groups.{printable(name)}", value) for name, value in groups.items()),
        _strings(f"{where}: ignore", section.get("ignore") or []),
    )


def _group(where: str, value: object) -> ConfigGroup:
    group = object_of(where, "group", value)
    weights = object_of(where, "weights", group.get("weights"))
    inputs = object_of(where, "input_activations", group.get("input_activations") or {})
    return ConfigGroup(_scheme(where, weights, inputs), _strings(where, group.get("targets")), inputs)


def _scheme(where: str, weights: Mapping[str, object], inputs: Mapping[str, object]) -> Scheme:
    """The grid of a group."""
    for packing in PACKINGS.values():
        scheme = packing.scheme(where, weights, inputs)
        if scheme is not None:
            return scheme
    found = ", ".join(f"{key} {weights.get(key)!r}" for key in ("type", "num_bits", "strategy", "group_size"))
    raise SourceError(
        f"{where}: {printable(found)} cannot be read.",
        hint="int of 2 to 8 bits (group, channel), FP8 blocks, NVFP4, MXFP4 and MXFP8 can.",
    )


def _strings(where: str, value: object) -> tuple[str, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    if not all(isinstance(item, str) for item in items):
        raise SourceError(f"{where}: needs a list of texts, found {printable(repr(value)[:80])}.")
    return tuple(cast("list[str]", items))


COMPRESSED_TENSORS = FolderLayout(
    FolderReader("compressed-tensors", _find), check=_check, stored=_stored, pack=_pack, config=quantization_config
)
