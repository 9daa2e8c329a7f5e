"""Calibration sets: long texts and long streams in memory that has a bound."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.documents import TextFile, stream_documents
from quantkit.calibrate.pieces import TextReader
from quantkit.calibrate.sets.cutting import pieces_of
from quantkit.calibrate.sets.pool import FULL, Pool, PooledDocument, draw
from quantkit.calibrate.sets.run import BuildOptions, build
from quantkit.errors import CalibrationError
from tests.calibrate.building import jsonl, prose
from tests.calibrate.byte_checkpoint import write


class CountingReader:
    """Reads a text, and remembers the most that was asked for at once."""

    def __init__(self, text: str) -> None:
        self._reader, self.most = TextReader(text), 0

    def read(self, n_characters: int, /) -> str:
        self.most = max(self.most, n_characters)
        return self._reader.read(n_characters)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab .\n床д😀"), max_size=400), st.integers(4, 60))
def test_pieces_hold_the_whole_text_and_are_short(text: str, most: int) -> None:
    reader = CountingReader(text)
    pieces = list(pieces_of(reader, most))
    assert all(0 < len(piece.encode()) <= most for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert reader.most <= most + 1


def test_pieces_end_at_paragraphs_lines_sentences_words() -> None:
    def cut(text: str) -> list[str]:
        return list(pieces_of(TextReader(text), 20))

    assert cut("one two three\n\nfour five six\nseven eight") == ["one two three", "four five six", "seven eight"]
    assert cut("One two three. Four five six.") == ["One two three. ", "Four five six."]
    assert cut("one two three four five six") == ["one two three four ", "five six"]
    assert cut("床前明月光。疑是地上霜。") == ["床前明月光。", "疑是地上霜。"]
    assert cut("x" * 45) == ["x" * 20, "x" * 20, "x" * 5]


def candidates(n: int, n_strata: int = 5, seed: int = 0) -> Iterator[PooledDocument]:
    """Made one at a time, no two alike."""
    draws = random.Random(seed)
    for number in range(n):
        stratum = (f"d{min(draws.randrange(n_strata), draws.randrange(n_strata))}", "Latin")
        yield PooledDocument(draws.getrandbits(64), stratum, draws.randrange(1, 100), b"", (2 * number, 2 * number + 1))


def test_the_pool_holds_little_of_a_long_stream_and_draws_as_from_all_of_it() -> None:
    pool, tokens, most = Pool(2000), 2000, 0
    for candidate in candidates(50_000):
        if pool.wants(candidate.stratum, candidate.key):
            pool.add(candidate)
        most = max(most, pool.n_tokens)
    assert most <= FULL * tokens + 100
    assert pool.draw(tokens) == draw(candidates(50_000), tokens)[0]


def test_documents_come_before_the_file_has_been_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nno JSON\n')
    stream = stream_documents(TextFile("a.jsonl", tmp_path / "a.jsonl"), lambda block: None)
    assert [next(stream).where, next(stream).where] == ["a.jsonl:1", "a.jsonl:2"]
    with pytest.raises(CalibrationError, match=r"a.jsonl:3: is not JSON"):
        next(stream)


def test_reading_is_told(tmp_path: Path) -> None:
    size = sum((tmp_path / jsonl(tmp_path / f"{i}.jsonl", [prose(i)])).stat().st_size for i in range(3))
    told: list[tuple[int, int]] = []
    build(("*.jsonl",), tmp_path / "set.jsonl", BuildOptions(), tmp_path, on_read=lambda *now: told.append(now))
    assert told[-1] == (size, size)
