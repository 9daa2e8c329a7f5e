"""The first damaged files of every reader: read, or refused in a line, in little time and memory. `benchmarks/fuzz.py`
tries many more of the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.errors import SourceError
from tests.faults import fuzzing
from tests.faults.binary_readers import binary_readers
from tests.faults.fuzzing import Reader, case_of, fuzz
from tests.faults.text_readers import text_readers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages by /proc"),
]
SEED = 1
CASES = {True: 400, False: 30}
"""Of a reader of binary files, and of one of text."""


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    place = tmp_path_factory.mktemp("readers")
    return {reader.name: reader for reader in (*binary_readers(place / "binary"), *text_readers(place / "text"))}


NAMES = (
    *("safetensors", "GGUF", "imatrix .gguf", "imatrix .dat", "parquet", "reference statistics", "hidden states"),
    *("recipe", "config.json", "index.json", "tokenizer.json", "tokenizer_config.json", "quantkit.json"),
    *("evaluation", "baseline", "journal", "jsonl", "chat template", "sensitivity", "unfinished pass"),
)


def test_all_readers_are_tried(readers: dict[str, Reader]) -> None:
    assert tuple(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(name: str, readers: dict[str, Reader]) -> None:
    reader = readers[name]
    found = fuzz(reader, SEED, range(CASES[reader.binary]))
    assert found.problems == {}
    assert found.read + found.refused == found.cases == CASES[reader.binary]
    assert found.refused > found.cases // 20, "the cases are not damaged enough to say anything"


def test_a_case_is_its_number(readers: dict[str, Reader]) -> None:
    reader = readers["GGUF"]
    assert case_of(reader, SEED, 7) == case_of(reader, SEED, 7) != case_of(reader, SEED, 8)


def _raise(error: BaseException) -> None:
    raise error


def _hang() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("misbehave", "said"),
    [
        (lambda: _raise(KeyError("x")), "KeyError at "),
        (lambda: _raise(MemoryError()), "MemoryError at "),
        (_hang, "TooSlow at "),
        (lambda: os.abort(), "the process died"),
        (lambda: bytearray(b"x") * 60_000_000, "memory"),
        (lambda: _raise(SourceError("\x1b[31m")), "control characters"),
        (lambda: _raise(SourceError("x" * 5000)), "a long message"),
    ],
)
def test_what_goes_wrong_is_found(
    misbehave: Callable[[], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second case of a reader goes wrong."""
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(fuzzing, "EXTRA_BYTES", 50_000_000)

    def read() -> None:
        if (tmp_path / "file").read_bytes() == b"1":
            misbehave()

    reader = Reader("bad", tmp_path / "file", b"0", lambda draw: b"01"[draw.randrange(2) :][:1], read, binary=True)
    found = fuzz(reader, SEED, range(6))
    assert found.cases == 6
    assert [what for what in found.problems if what.startswith(said)], found.problems
