"""Files made to mislead: each is refused with one line that names the file, and the tensor where there is one."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import MAX_HEADER_BYTES, MAX_JSON_PARTS, MAX_UNICODE_BYTES, read_header
from tests.formats.shards import assert_one_line, entry, write_bytes

GOOD = entry("F32", [2, 3], 0, 24)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_header(path)
    assert_one_line(caught.value, path.name, *words)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (entry("F31", [2, 3], 0, 24), ["unknown dtype", "'F31'", "BF16"]),
        (entry(["F32"], [2, 3], 0, 24), ["unknown dtype"]),
        (entry(None, [2, 3], 0, 24), ["unknown dtype"]),
        (entry("F32", [2, 4], 0, 24), ["[2, 4] needs 32 bytes", "span 24"]),
        (entry("BF16", [2, 3], 0, 24), ["BF16 [2, 3] needs 12 bytes"]),
        (entry("F32", [-2, -3], 0, 24), ["non-negative integers", "-2"]),
        (entry("F32", [2.0, 3], 0, 24), ["non-negative integers", "2.0"]),
        (entry("F32", [True, 6], 0, 24), ["non-negative integers", "True"]),
        (entry("F32", ["6"], 0, 24), ["non-negative integers"]),
        (entry("F32", {"0": 6}, 0, 24), ["non-negative integers"]),
        (entry("F32", [[6]], 0, 24), ["non-negative integers"]),
        (entry("F32", [2**63, 2**63], 0, 24), ["too many elements"]),
        (entry("F32", [0, 2**62], 0, 0), ["too many elements"]),
        (entry("F32", [10**4000], 0, 24), ["non-negative integers"]),
        (entry("F32", [1] * 9, 0, 24), ["9 dimensions"]),
        (entry("F32", [1] * 100_000, 0, 24), ["100,000 dimensions"]),
        (entry("F32", [2, 3], 24, 0), ["rising"]),
        (entry("F32", [2, 3], -24, 0), ["rising"]),
        (entry("F32", [2, 3], 0, 24.0), ["rising"]),
        (entry("F32", [2, 3], 0, 10**30), ["rising"]),
        ({**GOOD, "data_offsets": [0, 12, 24]}, ["rising"]),
        ({**GOOD, "data_offsets": 24}, ["rising"]),
        ({**GOOD, "extra": 1}, ["exactly dtype, shape and data_offsets"]),
        ({"dtype": "F32", "shape": [2, 3]}, ["exactly dtype, shape and data_offsets"]),
        ([], ["exactly dtype, shape and data_offsets"]),
        ("F32", ["exactly dtype, shape and data_offsets"]),
        (entry("F32", [2, 3], 4, 28), ["gap of 4 bytes", "the header"]),
    ],
)
def test_bad_entry(tmp_path: Path, bad: object, words: list[str]) -> None:
    refused(write_bytes(tmp_path / "a.safetensors", {"layer.bad.weight": bad}, bytes(24)), "layer.bad.weight", *words)


def test_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_bytes(path, {"first": GOOD, "second": entry("F32", [2, 3], 20, 44)}, bytes(44))
    refused(path, "second", "overlaps first by 4 bytes")
    write_bytes(path, {"first": GOOD, "second": GOOD}, bytes(24))
    refused(path, "second", "overlaps first by 24 bytes")
    write_bytes(path, {"first": GOOD, "second": entry("F32", [2, 3], 28, 52)}, bytes(52))
    refused(path, "second", "gap of 4 bytes", "first")
    write_bytes(path, {"first": GOOD, "second": entry("U8", [0], 12, 12)}, bytes(24))
    refused(path, "overlaps")
    write_bytes(path, {"first": GOOD}, bytes(25))
    refused(path, "1 bytes after first belong to no tensor")
    write_bytes(path, {"first": GOOD, "second": entry("U8", [8], 24, 32)}, bytes(31))
    refused(path, "second", "truncated")
    write_bytes(path, {}, bytes(1))
    refused(path, "1 bytes after the header belong to no tensor")


def test_empty_tensors_and_empty_files_are_sound(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.safetensors", {"none": entry("F32", [0, 7], 24, 24), "six": GOOD}, bytes(24))
    assert [stored.info.shape for stored in read_header(path).values()] == [(2, 3), (0, 7)]
    assert read_header(write_bytes(path, {})) == {}
    scalar = read_header(write_bytes(path, {"scalar": entry("I64", [], 0, 8)}, bytes(8)))["scalar"]
    assert (scalar.info.shape, scalar.stop - scalar.start, scalar.stop) == ((), 8, path.stat().st_size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not sound JSON"]),
        ("{", ["not sound JSON"]),
        ("[]", ["JSON list", "object was needed"]),
        ("null", ["NoneType"]),
        ("\ud800", ["not sound JSON"]),
        ('{"a": ' + json.dumps(GOOD) + ', "a": ' + json.dumps(GOOD) + "}", ["'a' occurs twice"]),
        ('{"a": {"dtype": "F32", "dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}', ["'dtype' occurs twice"]),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", ["nested too deeply"]),
        ('{"a\\u0000b": ' + json.dumps(GOOD) + "}", ["control characters", "\\x00"]),
        ('{"\\u001b[31mred": ' + json.dumps(GOOD) + "}", ["control characters", "\\x1b"]),
        ('{"\\ud800": ' + json.dumps(GOOD) + "}", ["control characters", "\\ud800"]),
        ('{"line\\nbreak": ' + json.dumps(GOOD) + "}", ["control characters"]),
        ('{"": ' + json.dumps(GOOD) + "}", ["empty"]),
        ('{"__metadata__": {"format": 1}}', ["__metadata__"]),
        ('{"__metadata__": null}', ["__metadata__"]),
        ('{"__metadata__": ["pt"]}', ["__metadata__"]),
    ],
)
def test_bad_json(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(write_bytes(tmp_path / "a.safetensors", text, bytes(24)), *words)


def test_names_of_any_length_make_a_short_message(tmp_path: Path) -> None:
    refused(write_bytes(tmp_path / "a.safetensors", {"x" * 1_000_000: entry("F32", [2], 0, 24)}, bytes(24)), "xxx...")


@pytest.mark.parametrize("length", [25, MAX_HEADER_BYTES + 1, 2**40, 2**63, 2**64 - 1])
def test_length_bombs_allocate_nothing(tmp_path: Path, length: int) -> None:
    path = write_bytes(tmp_path / "a.safetensors", "{}", bytes(22), length=length)
    tracemalloc.start()
    refused(path, f"{length:,} bytes")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("item", ["[],", "{},", "1,", '"",'])
def test_json_of_many_values_is_refused_before_it_is_parsed(tmp_path: Path, item: str) -> None:
    text = '{"a":[' + item * MAX_JSON_PARTS + "0]}"
    tracemalloc.start()
    refused(write_bytes(tmp_path / "a.safetensors", text), "values and keys, at most 3,000,000 are read")
    assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    tracemalloc.stop()


def test_one_rare_character_cannot_make_long_json_four_times_as_long(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.safetensors", '{"a":"' + "x" * MAX_UNICODE_BYTES + '\U0001f600"}')
    refused(path, "of JSON that is not ASCII")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"<!DOCTYPE html><html><title>429</title></html>", "'<!DOCTYPE'"),
        (b'{"error": "Repository not found"}', "'{\"error\":'"),
        (b"Entry not found", "'Entry'"),
    ],
)
def test_an_error_page_in_the_place_of_a_shard_is_named(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors", f"is no safetensors file (begins with {word})", "Fetch it again")


def test_a_sparse_file_cannot_carry_a_bomb(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.safetensors", "{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    refused(path, "at most 100,000,000")


@pytest.mark.parametrize("size", range(9))
def test_tiny_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(size))
    refused(path, "truncated" if size < 8 else "not sound JSON")


def test_what_is_not_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    refused(path, "no such file")
    path.symlink_to(path)
    refused(path, "cannot be opened")
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    refused(path, "no such file")
    path.unlink()
    path.mkdir()
    refused(path, "not a regular file")
    path.rmdir()
    os.mkfifo(path)
    refused(path, "not a regular file")
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 24\n")
    refused(path, "git-lfs pointer")
    with pytest.raises(SourceError, match="cannot be opened"):
        read_header(tmp_path / "nul\0.safetensors")


def test_symbolic_links_to_files_are_followed(tmp_path: Path) -> None:
    write_bytes(tmp_path / "blob", {"six": GOOD}, bytes(24))
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "blob")
    assert list(read_header(tmp_path / "a.safetensors")) == ["six"]


# Property tests: whatever the bytes, the outcome is a table of sound ranges or a SourceError of one line.

numbers = st.one_of(st.integers(-3, 30), st.integers(), st.floats(), st.booleans(), st.none(), st.just(10**50))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "X", 3]),
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | numbers,
    }
)
headers = st.dictionaries(st.text(max_size=5), entries | st.none() | st.text(max_size=3), max_size=4)


def check_outcome(path: Path) -> None:
    try:
        tensors = read_header(path)
    except SourceError as error:
        assert_one_line(error, "fuzz.safetensors")
        return
    at = path.stat().st_size - sum(stored.info.nbytes for stored in tensors.values())
    for stored in tensors.values():
        assert (stored.start, stored.stop) == (at, at + stored.info.nbytes)
        at = stored.stop
    assert at == path.stat().st_size


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers, data=st.binary(max_size=40), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header(tmp_path: Path, header: dict[str, object], data: bytes, length: int | None) -> None:
    check_outcome(write_bytes(tmp_path / "fuzz.safetensors", header, data, length=length))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 220), st.integers(0, 255)), max_size=4), cut=st.integers(0, 60))
def test_mutated_header(tmp_path: Path, edits: list[tuple[int, int]], cut: int) -> None:
    header = {"a": entry("F32", [2, 3], 0, 24), "b": entry("U8", [5], 24, 29), "__metadata__": {"format": "pt"}}
    path = write_bytes(tmp_path / "fuzz.safetensors", header, bytes(29))
    raw = bytearray(path.read_bytes())
    for at, value in edits:
        raw[at % len(raw)] = value
    path.write_bytes(raw[: len(raw) - cut])
    check_outcome(path)
