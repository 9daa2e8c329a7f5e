"""Sound binary files cut into their fields, so that a length or a count can be changed by itself."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class Cutter:
    """Takes fields off the front of ``data``."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.fields = data, 0, list[bytes]()

    def take(self, nbytes: int) -> bytes:
        self.fields.append(self.data[self.at : self.at + nbytes])
        self.at += nbytes
        return self.fields[-1]

    def integer(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def rest(self) -> list[bytes]:
        """All fields, what is left being the last."""
        return [field for field in (*self.fields, self.data[self.at :]) if field]


def gguf_fields(data: bytes) -> list[bytes]:
    """Magic, version, counts; lengths, names, types and values of key-values; entries of tensors; all data."""
    cutter = Cutter(data)
    cutter.take(4), cutter.take(4)
    n_tensors, n_keys = cutter.integer(8), cutter.integer(8)
    for _ in range(n_keys):
        cutter.take(cutter.integer(8))
        _gguf_value(cutter, cutter.integer(4))
    for _ in range(n_tensors):
        cutter.take(cutter.integer(8))
        for _ in range(cutter.integer(4)):
            cutter.take(8)
        cutter.take(4), cutter.take(8)
    return cutter.rest()


def _gguf_value(cutter: Cutter, kind: int) -> None:
    if kind == _STRING:
        cutter.take(cutter.integer(8))
    elif kind == _ARRAY:
        inner = cutter.integer(4)
        for _ in range(cutter.integer(8)):
            _gguf_value(cutter, inner)
    else:
        cutter.take(_NUMBER_BYTES[kind])


def dat_fields(data: bytes) -> list[bytes]:
    """Number of weights; length, name, chunks, number of values and values of each; the tail."""
    cutter = Cutter(data)
    for _ in range(cutter.integer(4)):
        cutter.take(cutter.integer(4))
        cutter.take(4)
        cutter.take(4 * cutter.integer(4))
    return cutter.rest()


def safetensors_fields(data: bytes) -> list[bytes]:
    """Length, header, data."""
    cutter = Cutter(data)
    cutter.take(cutter.integer(8))
    return cutter.rest()


def parquet_fields(data: bytes) -> list[bytes]:
    """Magic, pages, footer, its length, magic."""
    length = struct.unpack("<I", data[-8:-4])[0]
    cutter = Cutter(data)
    for nbytes in (4, len(data) - 12 - length, length, 4):
        cutter.take(nbytes)
    return cutter.rest()


def floats(data: bytes) -> list[bytes]:
    """Four bytes each."""
    return list(_fixed(data, 4))


def _fixed(data: bytes, nbytes: int) -> Iterator[bytes]:
    for at in range(0, len(data), nbytes):
        yield data[at : at + nbytes]
