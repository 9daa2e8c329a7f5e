"""The layout of compressed-tensors checkpoints: integers as ``pack-quantized``, kept FP8 blocks as ``float-quantized``.

A linear ``P.weight`` (out, in) on an integer grid is stored as ``pack-quantized``:

    P.weight_packed      int32 (out, ceil(in * bits / 32))     codes, `bitpack`
    P.weight_scale       bf16/f16/f32 (out, groups)            the scale that is served
    P.weight_zero_point  int32 (ceil(out * bits / 32), groups) only if asymmetric; packed along out
    P.weight_shape       int64 (2,)                            out, in

kept FP8 blocks as ``float-quantized`` (P.weight F8_E4M3, P.weight_scale F32 (out blocks, in blocks)); all else under
its own name. compressed-tensors counts codes from -2**(bits-1), quantkit from 0; both offsets cancel in (code -
zero_point), and the packed bits are the same.

Read back is what quantkit writes, and checkpoints of other tools: pack-quantized integers (groups or channels,
symmetric or with zero points, several config groups) and FP8 blocks. What cannot be read exactly is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from quantkit.errors import SchemeError, SourceError
from quantkit.formats.bitpack import WORD_BITS, n_words, pack, unpack
from quantkit.formats.folder import FolderLayout, FolderReader, PackedLinear, Rows, by_runs, object_of
from quantkit.formats.layouts.compressed_tensors_config import ConfigGroup, Resolver, Targets, quantization_config
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import Float8Scheme, IntScheme, QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SCALE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""A scheme's scale_dtype -> safetensors dtype."""
_PARTS = ("_packed", "_scale", "_shape", "_zero_point")

# --- writing ----------------------------------------------------------------------------------------------------------


def _check(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    if not isinstance(scheme, IntScheme | Float8Scheme):
        raise SchemeError(
            f"{name}: compressed-tensors cannot store {scheme.label}.",
            hint="Block types of ggml go into outputs of format: gguf.",
        )


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    scheme, prefix = tensor.scheme, f"{tensor.module}.weight"
    if isinstance(scheme, Float8Scheme):
        scale = TensorInfo(f"{prefix}_scale", scheme.scale_shape(tensor.info.shape), "F32")
        return TensorInfo(tensor.name, tensor.info.shape, "F8_E4M3"), scale
    assert isinstance(scheme, IntScheme), f"{tensor.name}: `_check` admits no other schemes"
    out_features, in_features = tensor.info.shape
    n_groups = scheme.n_groups(in_features)
    infos = [
        TensorInfo(f"{prefix}_packed", (out_features, n_words(in_features, scheme.bits)), "I32"),
        TensorInfo(f"{prefix}_scale", (out_features, n_groups), SCALE_DTYPES[scheme.scale_dtype]),
        TensorInfo(f"{prefix}_shape", (2,), "I64"),
    ]
    if not scheme.symmetric:
        infos.append(TensorInfo(f"{prefix}_zero_point", (n_words(out_features, scheme.bits), n_groups), "I32"))
    return tuple(infos)


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    import torch

    scheme, stored, name = tensor.scheme, tensor.stored, tensor.name
    if isinstance(scheme, Float8Scheme):
        # float32 is exact, whatever float the source stores scales in.
        return {name: stored["codes"], f"{name}_scale": stored["scale"].float()}
    assert isinstance(scheme, IntScheme), f"{name}: `_check` admits no other schemes"
    parts = {
        f"{name}_packed": pack(stored["codes"], scheme.bits),
        f"{name}_scale": stored["scale"],
        f"{name}_shape": torch.tensor(stored["codes"].shape),
    }
    if not scheme.symmetric:
        parts[f"{name}_zero_point"] = pack(stored["zero_point"].T.contiguous(), scheme.bits).T
    return parts


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Linear:
    """A `PackedLinear`."""

    scheme: IntScheme | Float8Scheme
    info: TensorInfo
    parts: tuple[str, ...]

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`. Only these rows are read, and those that share a word or a block with them."""
        if isinstance(self.scheme, Float8Scheme):
            return by_runs(rows, self.info.shape[1], partial(_read_float8, raw, self.info.name, self.scheme))
        return by_runs(rows, self.info.shape[1], partial(_read_int, raw, self.info, self.scheme))


def _read_int(raw: SafetensorsSource, info: TensorInfo, scheme: IntScheme, start: int, stop: int) -> Tensor:
    codes = unpack(raw.read(f"{info.name}_packed", (start, stop)), scheme.bits, info.shape[1])
    scale = raw.read(f"{info.name}_scale", (start, stop))
    zero_point = None if scheme.symmetric else _read_zero_point(raw, info, scheme, start, stop)
    return scheme.decode(codes, scale, zero_point)


def _read_zero_point(raw: SafetensorsSource, info: TensorInfo, scheme: IntScheme, start: int, stop: int) -> Tensor:
    """Zero points are packed along rows: 32 rows are exactly ``bits`` words, so reading starts at a multiple of 32
    rows."""
    first = start // WORD_BITS * WORD_BITS
    last = min(math.ceil(stop / WORD_BITS) * WORD_BITS, info.shape[0])
    first_word = first // WORD_BITS * scheme.bits
    words = raw.read(f"{info.name}_zero_point", (first_word, first_word + n_words(last - first, scheme.bits)))
    return unpack(words.T.contiguous(), scheme.bits, last - first).T[start - first : stop - first].contiguous()


def _read_float8(raw: SafetensorsSource, name: str, scheme: Float8Scheme, start: int, stop: int) -> Tensor:
    block_rows = scheme.block_size[0]
    first = start // block_rows * block_rows
    scale = raw.read(f"{name}_scale", (first // block_rows, math.ceil(stop / block_rows))).float()
    return scheme.decode(raw.read(name, (first, stop)), scale)[start - first :]


def _find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    resolver = resolver_of(str(raw.directory / "config.json"), section)
    stored = raw.infos()
    linears: dict[str, PackedLinear] = {}
    for name, info in stored.items():
        if name.endswith(".weight_packed"):
            owner = name.removesuffix("_packed")
            linears[owner] = _packed_linear(raw, owner, resolver.scheme(owner.removesuffix(".weight")))
        elif name.endswith(".weight") and f"{name}_scale" in stored:
            linears[name] = _float8_linear(raw, info, resolver.scheme(name.removesuffix(".weight")))
        elif not _is_part(name, stored):
            _check_plain(raw, info)
    return linears


def _check_plain(raw: SafetensorsSource, info: TensorInfo) -> None:
    where = f"{raw.path_of(info.name)}: {printable(info.name)}"
    if info.name.endswith((".weight_g_idx", ".weight_global_scale")):
        raise SourceError(f"{where}: this way of storing a linear is not supported.")
    if info.name.endswith(".weight") and info.dtype.startswith(("F8_", "I", "U")):
        raise SourceError(f"{where} is {info.dtype} without a weight_scale.")


def _packed_linear(raw: SafetensorsSource, name: str, scheme: Scheme | None) -> _Linear:
    stored = raw.infos()
    packed, scale = stored[f"{name}_packed"], stored.get(f"{name}_scale")
    where = f"{raw.path_of(packed.name)}: {printable(name)}"
    if not isinstance(scheme, IntScheme):
        raise SourceError(f"{where} is packed, but {raw.directory / 'config.json'} gives it no integer scheme.")
    if scale is None:
        raise SourceError(f"{where}: weight_packed has no weight_scale beside it.")
    dtype = next((ours for ours, theirs in SCALE_DTYPES.items() if theirs == scale.dtype), None)
    if dtype is None or len(scale.shape) != 2 or len(packed.shape) != 2:
        raise SourceError(f"{where}: weight_scale is {scale.dtype} {list(scale.shape)}, a matrix of floats was needed.")
    scheme = scheme.model_copy(update={"scale_dtype": dtype})
    shape = (packed.shape[0], _in_features(raw, name, scheme))
    needed = {
        f"{name}_packed": ("I32", (shape[0], n_words(shape[1], scheme.bits))),
        f"{name}_scale": (scale.dtype, (shape[0], scheme.n_groups(shape[1]))),
    }
    if not scheme.symmetric:
        needed[f"{name}_zero_point"] = "I32", (n_words(shape[0], scheme.bits), scheme.n_groups(shape[1]))
    for part, (part_dtype, part_shape) in needed.items():
        found = stored.get(part)
        if found is None or (found.dtype, found.shape) != (part_dtype, part_shape):
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise SourceError(f"{where}: {part.rpartition('.')[2]} is {what}, needed {part_dtype} {list(part_shape)}.")
    parts = tuple(name + suffix for suffix in _PARTS if name + suffix in stored)
    return _Linear(scheme, TensorInfo(name, shape, "F32"), parts)


def _in_features(raw: SafetensorsSource, name: str, scheme: IntScheme) -> int:
    """Inputs of a linear, from the number of its groups; rows of one scale need weight_shape (two numbers), since
    padding hides the true width."""
    stored = raw.infos()
    if scheme.group_size is not None:
        return stored[f"{name}_scale"].shape[1] * scheme.group_size
    shape = stored.get(f"{name}_shape")
    if shape is not None and shape.shape == (2,) and shape.dtype in ("I64", "I32"):
        return int(raw.read(shape.name)[1])
    return stored[f"{name}_packed"].shape[1] * WORD_BITS // scheme.bits


def _float8_linear(raw: SafetensorsSource, info: TensorInfo, scheme: Scheme | None) -> _Linear:
    stored = raw.infos()
    scale = stored[f"{info.name}_scale"]
    where = f"{raw.path_of(info.name)}: {printable(info.name)}"
    if not isinstance(scheme, Float8Scheme) or info.dtype != "F8_E4M3":
        raise SourceError(
            f"{where} is {info.dtype} with a weight_scale, but {raw.directory / 'config.json'} gives it no FP8 block "
            "scheme."
        )
    if len(info.shape) != 2 or scale.shape != scheme.scale_shape(info.shape):
        raise SourceError(
            f"{where}: weight_scale {list(scale.shape)} does not fit {list(info.shape)} in blocks "
            f"of {list(scheme.block_size)}."
        )
    parts = tuple(info.name + suffix for suffix in ("", *_PARTS) if info.name + suffix in stored)
    return _Linear(scheme, TensorInfo(info.name, info.shape, "F32"), parts)


def _is_part(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor belongs to a linear that is listed by its weight or its packed codes."""
    for suffix in _PARTS[1:]:
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
    return ConfigGroup(
        _scheme(where, object_of(where, "weights", group.get("weights"))), _strings(where, group.get("targets"))
    )


def _scheme(where: str, weights: Mapping[str, object]) -> Scheme:
    """The grid of a group. The dtype of the scales is not said here; each tensor's header says it."""
    bits, kind, strategy, group_size = (weights.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    symmetric = weights.get("symmetric") is not False
    match kind, bits, strategy, group_size:
        case "int", int(), "group", int() if 2 <= bits <= 8 and group_size >= 8:
            return IntScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="bfloat16")
        case "int", int(), "channel", _ if 2 <= bits <= 8:
            return IntScheme(bits=bits, group_size=None, symmetric=symmetric, scale_dtype="bfloat16")
        case "float", 8, "block", _:
            return Float8Scheme(block_size=_block_size(where, weights.get("block_structure")))
        case _:
            found = f"type {kind!r}, num_bits {bits!r}, strategy {strategy!r}, group_size {group_size!r}"
            raise SourceError(
                f"{where}: {printable(found)} cannot be read.",
                hint="int of 2 to 8 bits (group, channel) and FP8 blocks can.",
            )


def _block_size(where: str, value: object) -> tuple[int, int]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    match items:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case _:
            raise SourceError(
                f"{where}: block_structure is {printable(repr(value))}, two positive integers were needed."
            )


def _strings(where: str, value: object) -> tuple[str, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    if not all(isinstance(item, str) for item in items):
        raise SourceError(f"{where}: needs a list of texts, found {printable(repr(value)[:80])}.")
    return tuple(cast("list[str]", items))


COMPRESSED_TENSORS = FolderLayout(
    FolderReader("compressed-tensors", _find), check=_check, stored=_stored, pack=_pack, config=quantization_config
)
