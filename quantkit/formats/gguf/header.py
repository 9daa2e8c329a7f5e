"""The header of a GGUF file, read as if an enemy had written it: no weights, no torch.

What enters is a path; what leaves is the key-values and one `TensorEntry` per tensor, or a `SourceError` of one line.
Every count and length is compared with the bytes that are left in the file before anything is allocated; after that
every tensor is known to lie inside the file, to overlap no other and to be as long as its shape and type say.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.gguf.layout import ALIGNMENT, MAGIC, MAX_DIMS, MAX_NAME_BYTES, padded
from quantkit.formats.gguf.types import TYPES_BY_ID
from quantkit.formats.gguf.values import ARRAY_ID, NUMBERS, STRING_ID, Scalar, Value
from quantkit.formats.safetensors.header import printable
from quantkit.formats.storage import open_regular

MAX_HEADER_BYTES = 64_000_000
"""V3's is about 5 MB, most of it the tokenizer."""
MAX_ITEMS = 4_000_000
"""Most items of all arrays of a file together. A vocabulary of 256k with scores, types and merges has about 1.3 M."""
MAX_STRING_BYTES = 16_000_000
"""Longest string. A chat template has some 10 kB; one emoji makes four bytes of every character."""
MAX_TENSORS = 200_000
MAX_KEYS = 65_536
MAX_KEY_BYTES = 65_535
MAX_ELEMENTS = 2**60
_MAX_ALIGNMENT = 1 << 24
_READ_AHEAD = 1 << 20
_U64 = struct.Struct("<Q")
_KINDS = {number: (kind, struct.Struct("<" + code)) for kind, (number, code) in NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: ``nbytes`` bytes at byte ``offset`` of ``file`` (a name inside the model's folder).

    ``shape`` in numpy's order, the contiguous dimension last; ``kind``: name of the ggml type.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that one file says about itself. ``tensors`` in the order of the file; ``size``: bytes of the file."""

    file: str
    size: int
    version: int
    key_values: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]


def read_gguf_header(path: Path) -> GgufHeader:
    """Header of one file. Raises `SourceError` for anything that is not a sound little-endian GGUF of version 2 or 3,
    whole to its last tensor."""
    fd, size = open_regular(path)
    try:
        return _parse(_Cursor(path, fd, size))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error
    finally:
        os.close(fd)


def is_gguf(path: Path) -> bool:
    """Whether a file begins like a GGUF. Raises `SourceError` if it cannot be opened."""
    fd, _ = open_regular(path)
    try:
        return os.pread(fd, len(MAGIC), 0) == MAGIC
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error
    finally:
        os.close(fd)


class _Cursor:
    """A place in the header. Bytes are read ahead, and dropped once passed."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path = path
        self.size = size
        self.items_left = MAX_ITEMS
        self._fd = fd
        self._buffer = b""
        self._at = 0  # in the buffer
        self._passed = 0  # bytes of the file before the buffer

    @property
    def position(self) -> int:
        """Bytes of the file that were taken."""
        return self._passed + self._at

    def error(self, problem: str, hint: str = "") -> SourceError:
        return SourceError(f"{self.path}: {problem}.", hint=hint)

    def need(self, nbytes: int, what: str) -> None:
        """Refuse what cannot be: more bytes than are left, or than a header may have."""
        left = self.size - self.position
        if nbytes > left:
            raise self.error(f"truncated, {what} needs {nbytes:,} bytes, the file has {left:,} more")
        if self.position + nbytes > MAX_HEADER_BYTES:
            raise self.error(f"{what} makes the header longer than the {MAX_HEADER_BYTES:,} bytes that are allowed")

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes."""
        self._load(nbytes, what)
        start, self._at = self._at, self._at + nbytes
        return self._buffer[start : self._at]

    def number(self, form: struct.Struct, what: str) -> int | float | bool:
        return form.unpack(self.take(form.size, what))[0]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def name(self, what: str, limit: int) -> str:
        """A key or tensor name: printable UTF-8 of 1 to ``limit`` bytes."""
        length = self.u64(what)
        if length > limit:
            raise self.error(f"{what} claims a length of {length:,} bytes, at most {limit:,} are allowed")
        raw = self.take(length, what)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {printable(repr(raw))}") from error
        if not text or not text.isprintable():
            raise self.error(f"{what}, {printable(ascii(text))}, is empty or holds control characters")
        return text

    def strings(self, count: int, what: str) -> list[str]:
        """Strings with their lengths; what is no UTF-8 becomes U+FFFD, as some vocabularies hold cut characters."""
        items: list[str] = []
        buffer, at, end = self._buffer, self._at, len(self._buffer)
        for _ in range(count):  # a vocabulary: 129 thousand, so the buffer is walked without calls
            stop = at + 8
            if stop <= end:
                stop += _U64.unpack_from(buffer, at)[0]
            if stop > end:
                self._at = at
                self._load(8, what)
                length = _U64.unpack_from(self._buffer, self._at)[0]
                self.need(8 + length, what)
                if length > MAX_STRING_BYTES:
                    raise self.error(f"{what} is a text of {length:,} bytes, at most {MAX_STRING_BYTES:,} are read")
                self._load(8 + length, what)
                buffer, at, end = self._buffer, self._at, len(self._buffer)
                stop = at + 8 + _U64.unpack_from(buffer, at)[0]
            items.append(buffer[at + 8 : stop].decode("utf-8", "replace"))
            at = stop
        self._at = at
        return items

    def _load(self, nbytes: int, what: str) -> None:
        if len(self._buffer) - self._at >= nbytes:
            return
        self.need(nbytes, what)
        self._passed, self._at = self.position, 0
        wanted = min(max(nbytes, _READ_AHEAD), self.size - self._passed)
        self._buffer = os.pread(self._fd, wanted, self._passed)
        if len(self._buffer) < nbytes:
            raise self.error(f"truncated while it was read, at byte {self._passed + len(self._buffer):,}")


def _parse(cursor: _Cursor) -> GgufHeader:
    version = _version(cursor)
    n_tensors = _count(cursor, "tensors", MAX_TENSORS)
    n_keys = _count(cursor, "key-values", MAX_KEYS)
    key_values: dict[str, Value] = {}
    for number in range(n_keys):
        key = cursor.name(f"key {number + 1} of {n_keys}", MAX_KEY_BYTES)
        if key in key_values:
            raise cursor.error(f"the key {printable(key)} occurs twice")
        key_values[key] = _value(cursor, f"the value of {printable(key)}")
    alignment = _alignment(cursor, key_values)
    infos: dict[str, TensorEntry] = {}
    for number in range(n_tensors):
        entry = _tensor_info(cursor, f"tensor {number + 1} of {n_tensors}")
        if entry.name in infos:
            raise cursor.error(f"the tensor {printable(entry.name)} occurs twice")
        infos[entry.name] = entry
    data_start = padded(cursor.position, alignment)
    tensors = {name: _placed(cursor, entry, data_start, alignment) for name, entry in infos.items()}
    _check_places(cursor, tensors.values())
    return GgufHeader(cursor.path.name, cursor.size, version, key_values, tensors)


def _version(cursor: _Cursor) -> int:
    if cursor.size < 24:
        raise cursor.error(f"truncated, {cursor.size} bytes are too few for a GGUF file")
    magic = cursor.take(4, "the magic")
    if magic == b"vers":
        raise cursor.error("is a git-lfs pointer, not the weights", "Run `git lfs pull` in the model's folder.")
    if magic != MAGIC:
        raise cursor.error(f"is no GGUF file, it begins with {printable(repr(magic))} instead of {MAGIC!r}")
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise cursor.error("is a big-endian GGUF file; only little-endian ones are read", "Fetch or make another file.")
    if version not in (2, 3):
        raise cursor.error(f"is GGUF version {version}; versions 2 and 3 are read")
    return version


def _count(cursor: _Cursor, what: str, limit: int) -> int:
    count = cursor.u64(f"the number of {what}")
    if count > limit:
        raise cursor.error(f"claims {count:,} {what}, at most {limit:,} are allowed")
    return count


def _value(cursor: _Cursor, what: str) -> Value:
    kind_id = cursor.u32(what)
    if kind_id == ARRAY_ID:
        return _array(cursor, what)
    if kind_id == STRING_ID:
        return Value("string", cursor.strings(1, what)[0])
    if kind_id not in _KINDS:
        raise cursor.error(f"{what} has the unknown type {kind_id}")
    kind, form = _KINDS[kind_id]
    return Value(kind, cursor.number(form, what))


def _array(cursor: _Cursor, what: str) -> Value:
    kind_id, count = cursor.u32(what), cursor.u64(what)
    if kind_id == ARRAY_ID:
        raise cursor.error(f"{what} is an array of arrays, which no reader of GGUF supports")
    if kind_id != STRING_ID and kind_id not in _KINDS:
        raise cursor.error(f"{what} is an array of the unknown type {kind_id}")
    if count > cursor.items_left:
        raise cursor.error(f"{what} claims {count:,} items, at most {MAX_ITEMS:,} are allowed in all arrays of a file")
    cursor.items_left -= count
    if kind_id == STRING_ID:
        cursor.need(8 * count, what)
        return Value("string", tuple(cursor.strings(count, what)))
    kind, form = _KINDS[kind_id]
    raw = cursor.take(count * form.size, what)
    items: tuple[Scalar, ...] = struct.unpack(f"<{count}{NUMBERS[kind][1]}", raw)
    return Value(kind, items)


def _alignment(cursor: _Cursor, key_values: Mapping[str, Value]) -> int:
    if "general.alignment" not in key_values:
        return ALIGNMENT
    found = key_values["general.alignment"]
    alignment = found.value
    if found.kind != "u32" or not isinstance(alignment, int):
        raise cursor.error(f"general.alignment has the type {found.type_name}, u32 was needed")
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment:,}, a power of two up to {_MAX_ALIGNMENT:,} was needed")
    return alignment


def _tensor_info(cursor: _Cursor, what: str) -> TensorEntry:
    """One tensor checked by itself; its offset still counts from the start of the data."""
    name = cursor.name(f"the name of {what}", MAX_NAME_BYTES)
    n_dims = cursor.u32(name)
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"{name}: has {n_dims:,} dimensions, 1 to {MAX_DIMS} were needed")
    shape = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, name))[::-1]
    if min(shape) == 0 or math.prod(shape) > MAX_ELEMENTS:
        raise cursor.error(f"{name}: the shape {list(shape)} has no or too many elements")
    kind_id = cursor.u32(name)
    if kind_id not in TYPES_BY_ID:
        raise cursor.error(f"{name}: has the unknown ggml type {kind_id}")
    kind = TYPES_BY_ID[kind_id]
    if shape[-1] % kind.block:
        raise cursor.error(f"{name}: rows of {shape[-1]:,} are no multiple of {kind.block}, the block of {kind.name}")
    offset = cursor.u64(name)
    return TensorEntry(name, shape, kind.name, cursor.path.name, offset, kind.data_bytes(shape))


def _placed(cursor: _Cursor, entry: TensorEntry, data_start: int, alignment: int) -> TensorEntry:
    if entry.offset % alignment:
        raise cursor.error(f"{entry.name}: the offset {entry.offset:,} is no multiple of the alignment {alignment}")
    return TensorEntry(entry.name, entry.shape, entry.kind, entry.file, data_start + entry.offset, entry.nbytes)


def _check_places(cursor: _Cursor, tensors: Iterable[TensorEntry]) -> None:
    end, previous = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise cursor.error(f"{tensor.name}: overlaps {previous} by {end - tensor.offset:,} bytes")
        end, previous = tensor.offset + tensor.nbytes, tensor.name
    if end > cursor.size:
        raise cursor.error(
            f"truncated, {end - cursor.size:,} bytes are missing: {previous} ends at byte {end:,}, "
            f"the file has {cursor.size:,}",
            "Fetch the file again.",
        )
