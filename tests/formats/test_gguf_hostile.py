"""GGUF files made to mislead: each is refused with one line that names the file and what is wrong."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import SourceError
from quantkit.formats.gguf import values as v
from quantkit.formats.gguf.header import MAX_HEADER_BYTES, MAX_STRING_BYTES, read_gguf_header
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, imatrix_layout
from quantkit.formats.gguf.layout import GgufTensor, layout_gguf
from quantkit.formats.gguf.reader import GgufReader
from tests.formats.shards import assert_one_line

KEY_VALUES = {
    "general.architecture": v.string("deepseek2"),
    "a.number": v.u32(7),
    "a.words": v.strings(["one", "two", "three"]),
    "a.types": v.array("i32", [1, 2, 3]),
    "a.flag": v.boolean(True),
}
TENSORS = [GgufTensor("first", (3, 32), "Q8_0"), GgufTensor("second", (2, 3, 5), "F32")]


def file_bytes(key_values: dict[str, v.Value] = KEY_VALUES, tensors: list[GgufTensor] = TENSORS) -> bytes:
    (layout,) = layout_gguf("m", key_values, tensors).files
    return layout.header + bytes(layout.nbytes - len(layout.header))


GOOD = file_bytes()


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return len(raw).to_bytes(8, "little") + raw


def info(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def made(pairs: bytes = b"", n_pairs: int = 0, infos: bytes = b"", n_infos: int = 0, data: int = 64) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, n_infos, n_pairs) + pairs + infos
    return header + bytes(-len(header) % 32 + data)


def refused(path: Path, data: bytes, *words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_gguf_header(path)
    assert_one_line(caught.value, str(path), *words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["0 bytes are too few for a GGUF file"]),
        (GOOD[:23], ["23 bytes are too few"]),
        (b"ggjt" + GOOD[4:], ["is no GGUF file, it begins with b'ggjt' instead of b'GGUF'"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["git-lfs pointer", "git lfs pull"]),
        (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], ["big-endian"]),
        (b"GGUF" + struct.pack("<I", 1) + GOOD[8:], ["is GGUF version 1; versions 2 and 3 are read"]),
        (b"GGUF" + struct.pack("<I", 4) + GOOD[8:], ["version 4"]),
        (b"GGUF" + struct.pack("<I", 0) + GOOD[8:], ["version 0"]),
        (GOOD[:8] + b"\xff" * 8 + GOOD[16:], ["claims 18,446,744,073,709,551,615 tensors", "200,000"]),
        (GOOD[:16] + b"\xff" * 8 + GOOD[24:], ["claims 18,446,744,073,709,551,615 key-values"]),
        (GOOD[:8] + b"\3" + GOOD[9:], ["the name of tensor 3 of 3"]),
    ],
)
def test_bad_beginnings(tmp_path: Path, data: bytes, words: list[str]) -> None:
    refused(tmp_path / "m.gguf", data, *words)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (text("k") + struct.pack("<I", 13), ["the value of k has the unknown type 13"]),
        (text("k") + struct.pack("<I", 2**32 - 1), ["unknown type 4,294,967,295".replace(",", "")]),
        (text("k") + struct.pack("<IIQ", 9, 9, 1), ["k is an array of arrays"]),
        (text("k") + struct.pack("<IIQ", 9, 77, 1), ["an array of the unknown type 77"]),
        (text("k") + struct.pack("<IIQ", 9, 0, 2**40), ["claims 1,099,511,627,776 items, at most 4,000,000"]),
        (text("k") + struct.pack("<IIQ", 9, 8, 3_000_000), ["truncated, the value of k needs 24,000,000 bytes"]),
        (text("k") + struct.pack("<IIQ", 9, 12, 3_000_000), ["truncated, the value of k needs 24,000,000 bytes"]),
        (text("k") + struct.pack("<IQ", 8, 2**63), ["k needs 9,223,372,036,854,775,816 bytes, the file has"]),
        (text("k") + struct.pack("<IQ", 8, 2**64 - 1), ["truncated, the value of k needs"]),
        (text(""), ["key 1 of 1, '', is empty"]),
        (text("a\nb") + struct.pack("<II", 4, 1), ["key 1 of 1", "control characters"]),
        (text("\u202egpj") + struct.pack("<II", 4, 1), ["control characters", "\\u202e"]),
        (text(b"\xff\xfe") + struct.pack("<II", 4, 1), ["key 1 of 1 is not UTF-8"]),
        (struct.pack("<Q", 65_536), ["claims a length of 65,536 bytes, at most 65,535"]),
        (struct.pack("<Q", 2**64 - 1), ["claims a length of 18,446,744,073,709,551,615 bytes"]),
        (text("general.alignment") + struct.pack("<II", 4, 0), ["general.alignment is 0, a power of two"]),
        (text("general.alignment") + struct.pack("<II", 4, 48), ["general.alignment is 48"]),
        (text("general.alignment") + struct.pack("<II", 4, 2**31), ["is 2,147,483,648"]),
        (text("general.alignment") + struct.pack("<IQ", 10, 32), ["has the type u64, u32 was needed"]),
        (text("general.alignment") + struct.pack("<IIQI", 9, 4, 1, 32), ["has the type array of u32"]),
    ],
)
def test_bad_key_values(tmp_path: Path, pairs: bytes, words: list[str]) -> None:
    refused(tmp_path / "m.gguf", made(pairs, 1), *words)


def test_keys_and_tensors_occur_once(tmp_path: Path) -> None:
    pair = text("k") + struct.pack("<II", 4, 1)
    refused(tmp_path / "m.gguf", made(pair * 2, 2), "the key k occurs twice")
    refused(tmp_path / "m.gguf", made(b"", 0, info("t", (4,)) + info("t", (4,), 0, 32), 2), "the tensor t occurs twice")


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        (info("t", (), n_dims=0), ["t: has 0 dimensions, 1 to 4 were needed"]),
        (info("t", (1,) * 5), ["t: has 5 dimensions"]),
        (info("t", (4,), n_dims=2**32 - 1), ["t: has 4,294,967,295 dimensions"]),
        (info("t", (0,)), ["t: the shape [0] has no or too many elements"]),
        (info("t", (2**32, 2**32)), ["[4294967296, 4294967296] has no or too many elements"]),
        (info("t", (2**64 - 1,)), ["has no or too many elements"]),
        (info("t", (2**62, 0, 4)), ["has no or too many elements"]),
        (info("t", (4,), 99), ["t: has the unknown ggml type 99"]),
        (info("t", (4,), 4), ["t: has the unknown ggml type 4"]),  # Q4_2, removed in 2023
        (info("t", (48, 2), 8), ["t: rows of 48 are no multiple of 32, the block of Q8_0"]),
        (info("t", (4,), 0, 8), ["t: the offset 8 is no multiple of the alignment 32"]),
        (info("t", (4,), 0, 2**63), ["truncated", "bytes are missing: t ends at byte 9,223,372,036,854,775,"]),
        (info("t", (17,)), ["truncated, 4 bytes are missing: t ends at byte 132, the file has 128. Fetch"]),
        (info("x" * 64, (4,)), ["claims a length of 64 bytes, at most 63"]),
        (info("a\x1b[31m", (4,)), ["the name of tensor 1 of 1", "control characters"]),
        (info(b"\xc3\x28", (4,)), ["is not UTF-8"]),
        (info("", (4,)), ["is empty"]),
    ],
)
def test_bad_tensors(tmp_path: Path, infos: bytes, words: list[str]) -> None:
    refused(tmp_path / "m.gguf", made(b"", 0, infos, 1), *words)


def test_tensors_may_not_overlap_but_lie_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    refused(path, made(b"", 0, info("a", (9,)) + info("b", (4,), 0, 32), 2), "b: overlaps a by 4 bytes")
    refused(path, made(b"", 0, info("b", (4,), 0, 32) + info("a", (9,)), 2), "b: overlaps a by 4 bytes")
    refused(path, made(b"", 0, info("a", (4,)) + info("b", (4,)), 2), "b: overlaps a by 16 bytes")
    path.write_bytes(made(b"", 0, info("b", (4,), 0, 64) + info("a", (8,)), 2, data=80))
    assert [(t.name, t.nbytes) for t in read_gguf_header(path).tensors.values()] == [("b", 16), ("a", 32)]


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    end = len(GOOD) - 8  # the last tensor has 120 bytes; its padding may be absent
    path.write_bytes(GOOD[:end])
    assert len(read_gguf_header(path).tensors) == 2
    refused(path, GOOD[: end - 1], "truncated, 1 bytes are missing: second ends at byte")
    for size in range(24, len(GOOD) - 300, 7):
        refused(path, GOOD[:size], "truncated")


def test_vocabularies_may_hold_cut_characters(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(made(text("k") + struct.pack("<IIQ", 9, 8, 2) + text(b"\xe4\xb8") + text("ok"), 1))
    assert read_gguf_header(path).key_values["k"] == v.strings(["\ufffd", "ok"])


def test_long_strings_cross_the_bytes_that_are_read_ahead(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    words = ["x" * (n * 99_991 % 2_100_000) for n in range(12)]
    path.write_bytes(file_bytes({"k": v.strings(words), "n": v.array("u8", bytes(3_000_000)), "z": v.u8(1)}))
    header = read_gguf_header(path)
    assert header.key_values["k"].value == tuple(words)
    assert header.key_values["z"] == v.u8(1)


def test_bombs_allocate_little(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    bomb = text("k") + struct.pack("<IQ", 8, 2 * MAX_HEADER_BYTES)
    path.write_bytes(made(bomb, 1))
    os.truncate(path, 3 * MAX_HEADER_BYTES)
    tracemalloc.start()
    with pytest.raises(SourceError, match="header longer than the 64,000,000 bytes that are allowed"):
        read_gguf_header(path)
    many = struct.pack("<IIQ", 9, 0, 2_500_000)
    refused(path, made(text("a") + many + bytes(2_500_000) + text("b") + many, 2), "b claims 2,500,000 items")
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


def test_long_texts_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    long = b"x" * MAX_STRING_BYTES + "\U0001f600".encode()
    value = struct.pack("<IQ", 8, len(long)) + long
    tracemalloc.start()
    refused(tmp_path / "m.gguf", made(text("k") + value, 1), "the value of k is a text of 16,000,004 bytes")
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


def test_what_is_not_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for read in (read_gguf_header, GgufReader, Imatrix.open):
        with pytest.raises(SourceError, match="no such file"):
            read(path)
    os.mkfifo(path)
    for read in (read_gguf_header, GgufReader, Imatrix.open):
        with pytest.raises(SourceError, match="not a regular file"):
            read(path)


def imatrix_bytes() -> bytes:
    entries = [ImatrixEntry("blk.0.a.weight", 1, 8), ImatrixEntry("blk.0.b_exps.weight", 3, 4, experts=True)]
    (layout,) = imatrix_layout(entries, ["text"], 1, 8).files
    return layout.header + bytes(layout.nbytes - len(layout.header))


SPLITS = [
    file.header + bytes(file.nbytes - len(file.header)) for file in layout_gguf("m", KEY_VALUES, TENSORS, 1).files
]
EDIT = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 700), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("insert"), st.integers(0, 700), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("cut"), st.integers(0, 700), st.integers(1, 40).map(bytes)),
    st.tuples(st.just("u32"), st.integers(0, 700), st.integers(0, 2**32 - 1).map(lambda n: n.to_bytes(4, "little"))),
    st.tuples(st.just("end"), st.integers(0, 900), st.just(b"")),
)


def edited(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for how, at, what in edits:
        if how == "insert":
            data = data[:at] + what + data[at:]
        elif how == "cut":
            data = data[:at] + data[at + len(what) :]
        elif how == "end":
            data = data[:at]
        else:
            data = data[:at] + what + data[at + len(what) :]
    return data


def only_source_error(path: Path) -> None:
    try:
        with GgufReader(path) as reader:
            for entry in reader.tensors.values():
                assert 0 < entry.nbytes == len(reader.read_array(entry.name))
    except SourceError as error:
        assert_one_line(error)


FUZZ = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.lists(EDIT, min_size=1, max_size=3))
def test_mutated_files_are_read_or_refused(tmp_path: Path, edits: list[tuple[str, int, bytes]]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(edited(GOOD, edits))
    only_source_error(path)


@FUZZ
@given(st.lists(EDIT, min_size=1, max_size=3), st.sampled_from([0, 1]))
def test_mutated_splits_are_read_or_refused(tmp_path: Path, edits: list[tuple[str, int, bytes]], which: int) -> None:
    for number, data in enumerate(SPLITS):
        (tmp_path / f"m-{number + 1:05d}-of-00002.gguf").write_bytes(edited(data, edits) if number == which else data)
    only_source_error(tmp_path / "m-00001-of-00002.gguf")
    only_source_error(tmp_path)


@FUZZ
@given(
    st.lists(EDIT, min_size=1, max_size=3), st.sampled_from([imatrix_bytes(), b"\1\0\0\0\1\0\0\0a\1\0\0\0\1\0\0\0abcd"])
)
def test_mutated_imatrix_files_are_read_or_refused(
    tmp_path: Path, edits: list[tuple[str, int, bytes]], good: bytes
) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(edited(good, [(how, at % len(good), what) for how, at, what in edits]))
    try:
        with Imatrix.open(path) as imatrix:
            assert imatrix.sizes
            for name in imatrix.sizes:
                found = imatrix.of(name)
                assert found is not None
                assert found[0].min() >= 0
    except SourceError as error:
        assert_one_line(error)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0" + data)
    only_source_error(path)
