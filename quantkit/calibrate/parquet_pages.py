"""What the pages of a parquet file take when they are unpacked, by their own headers, before any is unpacked.

Enters: a file that ends in a footer. Leaves: compressed and unpacked bytes of each page. pyarrow takes as much memory
as a page's header says, up to 2 GB, and tells sizes of row groups alone, which need not be those of their pages.

    footer (FileMetaData) → row groups → column chunks → page, page, ... each with a header (PageHeader)

Source: apache/parquet-format, parquet.thrift and README.md; numbers below are field ids there. Thrift's compact
protocol: apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"PAR1"
_TAIL_BYTES = 8
_WINDOW, _LARGEST_HEADER = 1 << 12, 1 << 24  # the latter is pyarrow's
_LARGEST_FOOTER = 1 << 21  # of some 10,000 column chunks
_DEEPEST = 32
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT, _UUID = 1, 2, 3, 7, 8, 9, 10, 12, 13
_INTEGERS = (4, 5, 6)
_FIXED = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
_DATA_PAGE, _DATA_PAGE_V2 = 5, 8


class PageError(ValueError):
    """The file is none, or is cut."""


class Page(NamedTuple):
    """Bytes in the file and in memory."""

    stored: int
    unpacked: int


def pages(fd: int) -> Iterator[Page]:
    """The pages of all columns of an open file. Raises `PageError` for what is no parquet file."""
    size = os.fstat(fd).st_size
    tail = os.pread(fd, _TAIL_BYTES, size - _TAIL_BYTES) if size > _TAIL_BYTES else b""
    if tail[4:] != MAGIC:
        raise PageError("no footer at the end")
    (length,) = struct.unpack("<I", tail[:4])
    if length > min(size - _TAIL_BYTES, _LARGEST_FOOTER):
        raise PageError(f"a footer of {length:,} bytes")
    for chunk in _chunks(_Reader(os.pread(fd, length, size - _TAIL_BYTES - length))):
        yield from _pages_of(fd, chunk)


class _Chunk(NamedTuple):
    """The pages of a column in one row group: bytes ``[start, stop)``."""

    start: int
    stop: int
    n_values: int


class _Reader:
    """Thrift's compact protocol, value by value; what is not asked for is passed over and not kept."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n_bytes: int) -> bytes:
        """The next bytes."""
        if not 0 <= n_bytes <= len(self.data) - self.at:
            raise PageError("cut off")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def varint(self) -> int:
        """An unsigned integer of up to 64 bits."""
        value = shift = 0
        while shift < 70:
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise PageError("an integer without end")

    def integer(self) -> int:
        """A signed integer, in zigzag."""
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def fields(self) -> Iterator[tuple[int, int]]:
        """Id and kind of each field of a struct. Whoever asks takes its value before the next."""
        field = 0
        while (byte := self.take(1)[0]) != 0:
            field = field + (byte >> 4) if byte >> 4 else self.integer()
            yield field, byte & 0x0F

    def elements(self) -> Iterator[int]:
        """The kind of each element of a list."""
        (byte,) = self.take(1)
        count = byte >> 4 if byte >> 4 < 15 else self.varint()
        for _ in range(count):
            yield byte & 0x0F

    def structs(self, kind: int) -> Iterator[None]:
        """Each struct of a list, to be read."""
        if kind != _LIST:
            raise PageError("no list where one is needed")
        for element in self.elements():
            if element != _STRUCT:
                raise PageError("no structs in a list of them")
            yield

    def skip(self, kind: int, depth: int = 0, *, inside: bool = False) -> None:
        """Pass over a value. ``inside`` a list a truth value is a byte, elsewhere its kind says it."""
        if depth > _DEEPEST:
            raise PageError("nested too deeply")
        if kind in _INTEGERS:
            self.varint()
        elif kind in (_TRUE, _FALSE):
            self.take(inside)
        elif kind in _FIXED:
            self.take(_FIXED[kind])
        elif kind == _BINARY:
            self.take(self.varint())
        elif kind in (_LIST, _SET):
            for element in self.elements():
                self.skip(element, depth + 1, inside=True)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        else:
            raise PageError("a value of no known kind")  # maps are nowhere in these headers

    def integers(self, wanted: dict[int, int]) -> dict[int, int]:
        """The integer fields of a struct that are ``wanted``, which has their defaults."""
        found = dict(wanted)
        for field, kind in self.fields():
            if field in wanted and kind in _INTEGERS:
                found[field] = self.integer()
            else:
                self.skip(kind)
        return found


def _chunks(footer: _Reader) -> Iterator[_Chunk]:
    """FileMetaData.row_groups (4), RowGroup.columns (1), ColumnChunk.meta_data (3)."""
    for _ in _inside(footer, 4):
        for _ in _inside(footer, 1):
            for field, kind in footer.fields():
                if field == 3 and kind == _STRUCT:
                    yield _chunk(footer)
                else:
                    footer.skip(kind)


def _inside(reader: _Reader, wanted: int) -> Iterator[None]:
    """The structs of the lists in field ``wanted`` of a struct."""
    for field, kind in reader.fields():
        if field == wanted:
            yield from reader.structs(kind)
        else:
            reader.skip(kind)


def _chunk(footer: _Reader) -> _Chunk:
    """ColumnMetaData: num_values (5), total_compressed_size (7), data_page_offset (9), dictionary_page_offset (11)."""
    found = footer.integers({5: 0, 7: 0, 9: 0, 11: 0})
    start = min(found[9], found[11]) if found[11] > 0 else found[9]
    return _Chunk(start, start + found[7], found[5])


def _pages_of(fd: int, chunk: _Chunk) -> Iterator[Page]:
    """As pyarrow goes through them: until all values are seen, or the chunk ends."""
    at, n_values = chunk.start, 0
    while n_values < chunk.n_values and 0 <= at < chunk.stop:
        page, values, length = _read(fd, at)
        if page.stored < 0 or page.unpacked < 0:
            raise PageError("a page of negative size")
        yield page
        at += length + page.stored
        n_values += values


def _page(reader: _Reader) -> tuple[Page, int]:
    """PageHeader: uncompressed_page_size (2), compressed_page_size (3), and num_values (1) of either data page."""
    sizes, n_values = {2: 0, 3: 0}, 0
    for field, kind in reader.fields():
        if field in sizes and kind in _INTEGERS:
            sizes[field] = reader.integer()
        elif field in (_DATA_PAGE, _DATA_PAGE_V2) and kind == _STRUCT:
            n_values = max(0, reader.integers({1: 0})[1])
        else:
            reader.skip(kind)
    return Page(sizes[3], sizes[2]), n_values


def _read(fd: int, at: int) -> tuple[Page, int, int]:
    """The page whose header is at byte ``at`` of the file, its values, and the header's length."""
    window = _WINDOW
    while True:
        data = os.pread(fd, window, at)
        reader = _Reader(data)
        try:
            return *_page(reader), reader.at
        except PageError:
            if len(data) < window or window >= _LARGEST_HEADER:
                raise
            window *= 16
