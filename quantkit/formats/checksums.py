"""CRC-32 of byte ranges that were written in any order: of neighbours the one of both together follows from theirs.

A checksum of this kind finds a flipped byte, a torn write and a lost block, at the speed of memory. It is no proof
against someone who wants to deceive.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_POLYNOMIAL = 0xEDB88320
"""Of zlib's CRC-32, lowest power first: bit 31 is x^0."""
_ONE = 1 << 31
_X_TO_THE_8 = 1 << 23


class WrittenRange(NamedTuple):
    """``nbytes`` bytes from byte ``start`` of a file on. ``file``: its number in the layout. In JSON a list of four
    numbers."""

    file: int
    start: int
    nbytes: int
    crc32: int


def written_range(file: int, start: int, data: bytes | memoryview) -> WrittenRange:
    """The range that ``data`` fills."""
    return WrittenRange(file, start, memoryview(data).nbytes, zlib.crc32(data))


def merged(ranges: Iterable[WrittenRange]) -> tuple[WrittenRange, ...]:
    """As few ranges as cover the same bytes, sorted. No two may overlap."""
    found: list[WrittenRange] = []
    for item in sorted(ranges):
        last = found[-1] if found and found[-1].file == item.file else None
        assert last is None or last.start + last.nbytes <= item.start, f"{last} and {item} overlap"
        if last is not None and last.start + last.nbytes == item.start:
            crc = combined_crc32(last.crc32, item.crc32, item.nbytes)
            found[-1] = WrittenRange(last.file, last.start, last.nbytes + item.nbytes, crc)
        else:
            found.append(item)
    return tuple(found)


def combined_crc32(first: int, second: int, nbytes: int) -> int:
    """CRC-32 of two pieces one after the other; the second has ``nbytes`` bytes."""
    return _product(_shift(nbytes), first) ^ second


@lru_cache(maxsize=1024)
def _shift(nbytes: int) -> int:
    """x^(8 nbytes) modulo the polynomial, by repeated squaring."""
    result, power = _ONE, _X_TO_THE_8
    while nbytes:
        if nbytes & 1:
            result = _product(power, result)
        power = _product(power, power)
        nbytes >>= 1
    return result


def _product(a: int, b: int) -> int:
    """Of two polynomials over GF(2), modulo the CRC's."""
    result, bit = 0, _ONE
    while a:
        if a & bit:
            result ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return result
