"""Checksums of pieces in any order against zlib's of the whole."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.formats.checksums import WrittenRange, combined_crc32, merged, written_range


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_the_checksum_of_two_pieces_is_that_of_the_whole(first: bytes, second: bytes) -> None:
    found = combined_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert found == zlib.crc32(first + second)


def test_large_pieces() -> None:
    first, second = random.Random(1).randbytes(70_001), bytes((1 << 22) + 3)
    assert combined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(data=st.data(), content=st.binary(min_size=40, max_size=80))
def test_neighbours_become_one_range(data: st.DataObject, content: bytes) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=6)))
    pieces = [written_range(0, start, content[start:stop]) for start, stop in zip([0, *cuts], [*cuts, 40], strict=True)]
    pieces += [written_range(0, 50, b"x"), written_range(1, 51, b"y")]
    whole = WrittenRange(0, 0, 40, zlib.crc32(content[:40]))
    shuffled = data.draw(st.permutations(pieces))
    assert merged(shuffled) == (
        whole,
        WrittenRange(0, 50, 1, zlib.crc32(b"x")),
        WrittenRange(1, 51, 1, zlib.crc32(b"y")),
    )


def test_ranges_that_overlap_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="overlap"):
        merged([written_range(0, 0, b"ab"), written_range(0, 1, b"b")])
