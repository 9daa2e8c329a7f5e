"""A finished compressed-tensors checkpoint as a `TensorSource`: every linear appears decoded, float32, under its
official name.

Reads what quantkit writes, and pack-quantized integer checkpoints of other tools (groups or channels, symmetric or with
zero points, several config groups), and float-quantized FP8 blocks. What it cannot read exactly it refuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from quantkit.errors import SourceError
from quantkit.formats.bitpack import WORD_BITS, n_words, unpack
from quantkit.formats.layouts.compressed_tensors import SCALE_DTYPES
from quantkit.formats.layouts.compressed_tensors_config import ConfigGroup, Resolver, Targets
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource, row_ranges
from quantkit.formats.source import read_config
from quantkit.schemes import Float8Scheme, IntScheme, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = ("_packed", "_scale", "_shape", "_zero_point")


@dataclass(frozen=True, slots=True)
class _Linear:
    """A decoded linear: its scheme and how it appears."""

    scheme: IntScheme | Float8Scheme
    info: TensorInfo


class CompressedTensorsSource:
    """Decoded tensors of one folder. ``config``: the raw config.json. Reads are thread-safe; `close` (or ``with``) when
    done."""

    def __init__(self, directory: Path | str) -> None:
        """Read config.json and headers. Raises `SourceError` for what is damaged, incomplete, or stored in a way it
        cannot decode."""
        self.directory = Path(directory)
        self.config: Mapping[str, object] = read_config(self.directory)
        self._where = str(self.directory / "config.json")
        try:
            self._resolver = Resolver(_targets(self._where, self.config))
        except re.error as error:
            raise SourceError(f"{self._where}: a target or ignore pattern is malformed ({error}).") from error
        self.raw = SafetensorsSource(self.directory)
        self._linears: dict[str, _Linear] = {}
        self._infos = {info.name: info for info in self._decoded_infos()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by official name; quantised linears as F32."""
        return self._infos

    def scheme(self, name: str) -> Scheme | None:
        """How a tensor of `infos` is stored, None if it is unquantised."""
        linear = self._linears.get(name)
        return None if linear is None else linear.scheme

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor or rows ``[start, stop)``, on the CPU; of packed linears only these rows are read and decoded."""
        linear = self._linears.get(name)
        if linear is None:
            return self.raw.read(name, rows)
        start, stop = rows or (0, linear.info.shape[0])
        if start == stop:
            return _no_rows(linear.info)
        if isinstance(linear.scheme, Float8Scheme):
            return self._read_float8(name, linear.scheme, start, stop)
        return self._read_int(name, linear, linear.scheme, start, stop)

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows in the given order, repeats allowed. Of a quantised linear each row is read by itself."""
        if name not in self._linears:
            return self.raw.read_rows(name, indices)
        import torch

        rows = [self.read(name, (row, row + 1)) for row in indices]
        return torch.cat(rows) if rows else self.read(name, (0, 0))

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The tensor in consecutive pieces of its first dimension, each at most ``max_bytes`` (decoded) but at least
        one row."""
        for rows in row_ranges(self._infos[name], max_bytes):
            yield self.read(name, rows)

    def prefetch(self, names: list[str]) -> None:
        """Ask the operating system to read these tensors ahead."""
        stored = self.raw.infos()
        self.raw.prefetch(
            [part for name in names for part in (name, *(name + suffix for suffix in _PARTS)) if part in stored]
        )

    def close(self) -> None:
        """Give the file descriptors back."""
        self.raw.close()

    def __enter__(self) -> CompressedTensorsSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _decoded_infos(self) -> Iterator[TensorInfo]:
        stored = self.raw.infos()
        for name, info in stored.items():
            if name.endswith(".weight_packed"):
                yield self._packed_linear(name.removesuffix("_packed"), stored)
            elif name.endswith(".weight") and f"{name}_scale" in stored:
                yield self._float8_linear(info, stored)
            elif not _is_part(name, stored):
                if name.endswith((".weight_g_idx", ".weight_global_scale")):
                    raise SourceError(
                        f"{self.raw.path_of(name)}: {printable(name)}: this way of storing a linear is not supported."
                    )
                if name.endswith(".weight") and info.dtype.startswith(("F8_", "I", "U")):
                    raise SourceError(
                        f"{self.raw.path_of(name)}: {printable(name)} is {info.dtype} without a weight_scale."
                    )
                yield info

    def _packed_linear(self, name: str, stored: Mapping[str, TensorInfo]) -> TensorInfo:
        scheme = self._resolver.scheme(name.removesuffix(".weight"))
        packed, scale = stored[f"{name}_packed"], stored.get(f"{name}_scale")
        where = f"{self.raw.path_of(packed.name)}: {printable(name)}"
        if not isinstance(scheme, IntScheme):
            raise SourceError(f"{where} is packed, but {self._where} gives it no integer scheme.")
        if scale is None:
            raise SourceError(f"{where}: weight_packed has no weight_scale beside it.")
        dtype = next((ours for ours, theirs in SCALE_DTYPES.items() if theirs == scale.dtype), None)
        if dtype is None or len(scale.shape) != 2 or len(packed.shape) != 2:
            raise SourceError(
                f"{where}: weight_scale is {scale.dtype} {list(scale.shape)}, a matrix of floats was needed."
            )
        scheme = scheme.model_copy(update={"scale_dtype": dtype})
        shape = (packed.shape[0], self._in_features(name, scheme, scale, packed, stored))
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
                raise SourceError(
                    f"{where}: {part.rpartition('.')[2]} is {what}, needed {part_dtype} {list(part_shape)}."
                )
        self._linears[name] = _Linear(scheme, TensorInfo(name, shape, "F32"))
        return self._linears[name].info

    def _in_features(
        self, name: str, scheme: IntScheme, scale: TensorInfo, packed: TensorInfo, stored: Mapping[str, TensorInfo]
    ) -> int:
        """From the scales of groups; rows of one scale need weight_shape (two numbers), since padding hides the true
        width."""
        if scheme.group_size is not None:
            return scale.shape[1] * scheme.group_size
        shape = stored.get(f"{name}_shape")
        if shape is not None and shape.shape == (2,) and shape.dtype in ("I64", "I32"):
            return int(self.raw.read(shape.name)[1])
        return packed.shape[1] * WORD_BITS // scheme.bits

    def _float8_linear(self, info: TensorInfo, stored: Mapping[str, TensorInfo]) -> TensorInfo:
        scheme = self._resolver.scheme(info.name.removesuffix(".weight"))
        scale = stored[f"{info.name}_scale"]
        where = f"{self.raw.path_of(info.name)}: {printable(info.name)}"
        if not isinstance(scheme, Float8Scheme) or info.dtype != "F8_E4M3":
            raise SourceError(
                f"{where} is {info.dtype} with a weight_scale, but {self._where} gives it no FP8 block scheme."
            )
        if len(info.shape) != 2 or scale.shape != scheme.scale_shape(info.shape):
            raise SourceError(
                f"{where}: weight_scale {list(scale.shape)} does not fit {list(info.shape)} in blocks "
                f"of {list(scheme.block_size)}."
            )
        self._linears[info.name] = _Linear(scheme, TensorInfo(info.name, info.shape, "F32"))
        return self._linears[info.name].info

    def _read_int(self, name: str, linear: _Linear, scheme: IntScheme, start: int, stop: int) -> Tensor:
        in_features = linear.info.shape[1]
        codes = unpack(self.raw.read(f"{name}_packed", (start, stop)), scheme.bits, in_features)
        scale = self.raw.read(f"{name}_scale", (start, stop))
        zero_point = None if scheme.symmetric else self._read_zero_point(name, linear, scheme, start, stop)
        return scheme.decode(codes, scale, zero_point)

    def _read_zero_point(self, name: str, linear: _Linear, scheme: IntScheme, start: int, stop: int) -> Tensor:
        """Zero points are packed along rows: 32 rows are exactly ``bits`` words, so reading starts at a multiple of 32
        rows."""
        first = start // WORD_BITS * WORD_BITS
        last = min(math.ceil(stop / WORD_BITS) * WORD_BITS, linear.info.shape[0])
        first_word = first // WORD_BITS * scheme.bits
        words = self.raw.read(f"{name}_zero_point", (first_word, first_word + n_words(last - first, scheme.bits)))
        return unpack(words.T.contiguous(), scheme.bits, last - first).T[start - first : stop - first].contiguous()

    def _read_float8(self, name: str, scheme: Float8Scheme, start: int, stop: int) -> Tensor:
        block_rows = scheme.block_size[0]
        first = start // block_rows * block_rows
        scale = self.raw.read(f"{name}_scale", (first // block_rows, math.ceil(stop / block_rows))).float()
        if start == first:
            return scheme.decode(self.raw.read(name, (start, stop)), scale)
        return scheme.decode(self.raw.read(name, (first, stop)), scale)[start - first :]


def _no_rows(info: TensorInfo) -> Tensor:
    import torch

    return torch.empty(0, info.shape[1])


def _is_part(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor belongs to a linear that is listed by its weight or its packed codes."""
    for suffix in _PARTS[1:]:
        base = name.removesuffix(suffix)
        if base != name and base.endswith(".weight"):
            return f"{base}_packed" in stored or base in stored
    return False


def _targets(where: str, config: Mapping[str, object]) -> Targets:
    """Groups and ignore list of a raw config.json. Raises `SourceError` for schemes that quantkit has no grid for."""
    section = _object(where, "quantization_config", config.get("quantization_config"))
    if section.get("quant_method") != "compressed-tensors":
        raise SourceError(
            f"{where}: quant_method is {printable(repr(section.get('quant_method')))}, compressed-tensors was needed."
        )
    groups = _object(where, "config_groups", section.get("config_groups"))
    return Targets(
        tuple(_group(f"{where}: config_groups.{printable(name)}", value) for name, value in groups.items()),
        _strings(f"{where}: ignore", section.get("ignore") or []),
    )


def _group(where: str, value: object) -> ConfigGroup:
    group = _object(where, "group", value)
    return ConfigGroup(
        _scheme(where, _object(where, "weights", group.get("weights"))), _strings(where, group.get("targets"))
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


def _object(where: str, key: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise SourceError(f"{where}: {key} is {printable(repr(value)[:80])}, an object was needed.")
    return cast("dict[str, object]", value)


def _strings(where: str, value: object) -> tuple[str, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    if not all(isinstance(item, str) for item in items):
        raise SourceError(f"{where}: needs a list of texts, found {printable(repr(value)[:80])}.")
    return tuple(cast("list[str]", items))
