"""The header of a safetensors file, read as if an enemy had written it: pure Python, no weights, no torch.

A file is an 8-byte little-endian length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` and the data. What enters is a path; what leaves is one
`StoredTensor` per tensor, or a `SourceError` that names file and tensor. After that every byte range is known to lie
inside the file, to overlap no other and to be exactly as long as its shape and dtype say.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from quantkit.errors import SourceError
from quantkit.formats.storage import LOCAL, Storage, printable
from quantkit.tensors import DTYPES, TensorInfo

INDEX_NAME = "model.safetensors.index.json"
"""Beside the shards of a folder: which of them holds what."""
MAX_HEADER_BYTES = 100_000_000
"""Same limit as the reference implementation. V3's largest header is about 0.1 MB."""
LFS_START = b"version https://git-lfs"
"""How the text file begins that git-lfs leaves in the place of a large one."""
MAX_DIMS = 8
MAX_ELEMENTS = 2**60
"""Bound on the product of the non-zero dimensions: keeps sizes and strides inside int64, even of an empty tensor."""
MAX_DIGITS = 19
MAX_JSON_PARTS = 3_000_000
"""Commas, colons and opening brackets of a JSON text that is parsed: bounds the objects that it becomes, which take
fifty times the memory of their text. V3's index has 0.2 M, all its tensors in one header would have 1.1 M."""
MAX_UNICODE_BYTES = 32_000_000
"""Of a JSON text that is not all ASCII: one character beyond the basic plane makes four bytes of every one."""
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes ``[start, stop)`` of the shard ``file`` (a name inside the checkpoint's folder)."""

    info: TensorInfo
    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """All that one shard says about itself.

    ``digest``: sha256 of the length and header bytes; ``data_start``: offset of the first data byte in the file.
    """

    file: str
    size: int
    data_start: int
    digest: bytes
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file in the order of their data.

    Raises `SourceError` for anything that is not a sound safetensors file of exactly the size that its header
    implies.
    """
    return dict(read_shard(path).tensors)


def read_shard(path: Path, storage: Storage = LOCAL) -> ShardHeader:
    """Header of one shard with size and digest. Raises `SourceError` as `read_header` does."""
    with closing(storage.open(path)) as file:
        size, start = file.size, file.pread(64, 0)
        prefix = start[:8]
        length = _header_length(path, start, size)
        raw = file.pread(length, 8)
    if len(raw) != length:
        raise SourceError(f"{path}: truncated, the header should have {length:,} bytes but {len(raw):,} could be read.")
    entries = parse_json_object(raw, str(path))
    _check_metadata(path, entries.pop("__metadata__", {}))
    tensors = [_stored_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_layout(path, tensors, 8 + length, size)
    by_name = {tensor.info.name: tensor for tensor in tensors}
    return ShardHeader(path.name, size, 8 + length, hashlib.sha256(prefix + raw).digest(), by_name)


def parse_json_object(raw: bytes, where: str) -> dict[str, object]:
    """One JSON object, each key once at every depth. Raises `SourceError` that starts with ``where``, before it takes
    more than a few hundred MB or seconds.

    Integers of more than `MAX_DIGITS` digits arrive as text: nothing here needs them, and converting them takes
    quadratic time.
    """
    check_json_size(raw, where)
    try:
        parsed: object = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_int=_short_int)
    except RecursionError as error:
        raise SourceError(f"{where}: the JSON is nested too deeply.") from error
    except ValueError as error:
        raise SourceError(f"{where}: is not sound JSON ({printable(str(error))}).") from error
    if not isinstance(parsed, dict):
        raise SourceError(f"{where}: holds a JSON {type(parsed).__name__}, an object was needed.")
    return cast("dict[str, object]", parsed)


def check_json_size(raw: bytes, where: str, limit: int = MAX_JSON_PARTS) -> None:
    """Refuse a JSON text that would become more objects than anything real needs: `SourceError`. Those inside strings
    count too."""
    parts = sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))
    if parts > limit:
        raise SourceError(f"{where}: its JSON has {parts:,} values and keys, at most {limit:,} are read.")
    if len(raw) > MAX_UNICODE_BYTES and not raw.isascii():
        raise SourceError(
            f"{where}: {len(raw):,} bytes of JSON that is not ASCII, at most {MAX_UNICODE_BYTES:,} are read."
        )


def as_strings(value: object) -> dict[str, str] | None:
    """``value`` if it is a JSON object of text -> text, else None."""
    if not isinstance(value, dict):
        return None
    pairs = cast("dict[str, object]", value)
    return cast("dict[str, str]", pairs) if all(isinstance(item, str) for item in pairs.values()) else None


class _DuplicateKey(ValueError):
    """A JSON object names a key twice: two readers could see two different files."""


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        # set.add returns None, so the first name already seen is the first that passes the filter.
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _DuplicateKey(f"the key {twice!r} occurs twice")
    return unique


def _short_int(digits: str) -> int | str:
    return int(digits) if len(digits) <= MAX_DIGITS else digits


def first_word(raw: bytes) -> str:
    """The first word of a file that is text, at most 20 characters, "" for a file that does not begin with text."""
    start = raw[:64].lstrip()[:20]
    word = start.split()[0] if start.split() else b""
    return word.decode() if word.isascii() and word.decode().isprintable() else ""


def _header_length(path: Path, start: bytes, size: int) -> int:
    prefix = start[:8]
    if start.startswith(LFS_START[:8]):
        raise SourceError(
            f"{path}: is a git-lfs pointer, not the weights.", hint="Run `git lfs pull` in the checkpoint's folder."
        )
    if len(prefix) < 8:
        raise SourceError(f"{path}: truncated, {size} bytes are too few for a safetensors file.")
    length = int.from_bytes(prefix, "little")
    if prefix.isascii() and prefix.decode().replace("\n", " ").isprintable() and (word := first_word(start)):
        # As a number, eight characters of text are a header of a quintillion bytes.
        raise SourceError(f"{path}: is no safetensors file (begins with {word!r}).", hint="Fetch it again.")
    if length > MAX_HEADER_BYTES:
        raise SourceError(f"{path}: claims a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed.")
    if length > size - 8:
        raise SourceError(f"{path}: claims a header of {length:,} bytes, but the file has only {size:,} (truncated?).")
    return length


def _check_metadata(path: Path, metadata: object) -> None:
    if as_strings(metadata) is None:
        raise SourceError(f"{path}: __metadata__ must be an object of text values, found {printable(repr(metadata))}.")


def _stored_tensor(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """One header entry, checked by itself: keys, dtype, dimensions, and that they agree with its length."""
    if not name or not name.isprintable():
        raise SourceError(f"{path}: the tensor name {printable(ascii(name))} is empty or holds control characters.")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        found = printable(repr(cast("object", entry)))
        raise _refusal(path, name, f"needs exactly dtype, shape and data_offsets, found {found}")
    fields = cast("dict[str, object]", entry)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _refusal(path, name, f"unknown dtype {printable(repr(dtype))}, known are {', '.join(DTYPES)}")
    info = TensorInfo(name, _shape(path, name, fields["shape"]), dtype)
    begin, end = _offsets(path, name, fields["data_offsets"])
    if end - begin != info.nbytes:
        needed = f"{dtype} {list(info.shape)} needs {info.nbytes:,} bytes"
        raise _refusal(path, name, f"{needed}, its offsets span {end - begin:,}")
    return StoredTensor(info, path.name, data_start + begin, data_start + end)


def _refusal(path: Path, name: str, problem: str) -> SourceError:
    return SourceError(f"{path}: {printable(name)}: {problem}.")


def _sizes(value: object) -> list[int] | None:
    """A JSON list of non-negative integers (``true`` is none), else None."""
    if not isinstance(value, list):
        return None
    for item in cast("list[object]", value):
        if type(item) is not int or item < 0:
            return None
    return cast("list[int]", value)


def _shape(path: Path, name: str, value: object) -> tuple[int, ...]:
    shape = _sizes(value)
    if shape is None:
        found = printable(repr(value))
        raise _refusal(path, name, f"shape must be a list of non-negative integers, found {found}")
    if len(shape) > MAX_DIMS:
        raise _refusal(path, name, f"shape has {len(shape):,} dimensions, at most {MAX_DIMS} are supported")
    if math.prod(shape) > MAX_ELEMENTS or (0 in shape and math.prod(filter(None, shape)) > MAX_ELEMENTS):
        raise _refusal(path, name, f"shape {shape} has too many elements")
    return tuple(shape)


def _offsets(path: Path, name: str, value: object) -> tuple[int, int]:
    offsets = _sizes(value)
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        found = printable(repr(value))
        raise _refusal(path, name, f"data_offsets must be two rising non-negative integers, found {found}")
    return offsets[0], offsets[1]


def _check_layout(path: Path, tensors: Iterable[StoredTensor], data_start: int, size: int) -> None:
    """Every data byte must belong to one tensor: hidden or shared bytes can mean different things to two readers."""
    expected, previous = data_start, "the header"
    for tensor in tensors:
        name = tensor.info.name
        if tensor.start < expected:
            overlap = f"overlaps {printable(previous)} by {expected - tensor.start:,} bytes"
            raise _refusal(path, name, overlap)
        if tensor.start > expected:
            raise _refusal(path, name, f"leaves a gap of {tensor.start - expected:,} bytes after {printable(previous)}")
        if tensor.stop > size:
            raise _refusal(path, name, f"ends at byte {tensor.stop:,}, but the file has only {size:,} (truncated)")
        expected, previous = tensor.stop, name
    if expected != size:
        last = printable(previous)
        raise SourceError(f"{path}: {size - expected:,} bytes after {last} belong to no tensor.")
