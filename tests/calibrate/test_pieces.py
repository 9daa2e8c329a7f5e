"""A long text in pieces has the ids of the whole, whatever the tokenizer and wherever the windows end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from quantkit.calibrate import pieces
from quantkit.calibrate import tokenizer as tokenizer_module
from quantkit.calibrate.documents import builtin_dir
from tests.calibrate.byte_checkpoint import rows_of, write, write_checkpoint
from tests.calibrate.tokenizers_small import SENTENCES, byte_level, llama2, metaspace

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "examples" / "nano-deepseek-v3" / "tokenizer.json"
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "nano": lambda: Tokenizer.from_file(str(NANO)),
    "byte-level": byte_level,
    "metaspace": metaspace,
    "llama2": llama2,
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[str(request.param)]()


def in_pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    return np.concatenate(list(pieces.read_ids(tokenizer, pieces.TextReader(text)))).tolist()


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_the_texts_of_this_repository(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*sorted((builtin_dir() / "eval").iterdir()), *sorted((ROOT / "docs").glob("*.md"))[:4]]
    text = "\n".join(path.read_text() for path in files)
    expected = whole(tokenizer, text)
    for window in (9001, 1 << 15, pieces.WINDOW):
        monkeypatch.setattr(pieces, "WINDOW", window)
        assert in_pieces(tokenizer, text) == expected


PARTS = st.one_of(
    st.sampled_from(
        [*SENTENCES, "\n", "\n\n", " ", "  \n ", "=" * 150, " " * 130, "12345678" * 9, "<|end|>", "\u0301"]
    ),
    st.text(max_size=40),
)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(PARTS, max_size=40), repeats=st.integers(1, 8), window=st.integers(200, 900))
def test_random_text_and_windows(tokenizer: Tokenizer, parts: list[str], repeats: int, window: int) -> None:
    text = "".join(parts) * repeats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "WINDOW", window)
        patch.setattr(pieces, "OVERLAP", 160)
        assert in_pieces(tokenizer, text) == whole(tokenizer, text)


def test_a_run_of_one_character_makes_the_window_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "WINDOW", 5000)
    text = "one " * 900 + "=" * 30_011 + " " * 7_001 + "a\n" * 9000
    assert in_pieces(tokenizer, text) == whole(tokenizer, text)


def test_no_more_than_a_window_is_tokenised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of text as of a long line; the ids go to a temporary file where they are many."""
    checkpoint = write_checkpoint(tmp_path / "model")
    text = "".join(f"line {i}, of which each is another\n" for i in range(12_000))
    name = write(tmp_path / "long.txt", text)
    expected = rows_of(checkpoint, tmp_path, name, tokens=256, length=64)
    lengths: list[int] = []
    real = pieces._window

    def counted(tokenizer: Tokenizer, text: str, begin: int = 0) -> object:
        lengths.append(len(text))
        return real(tokenizer, text, begin)

    monkeypatch.setattr(pieces, "_window", counted)
    monkeypatch.setattr(tokenizer_module, "IDS_IN_MEMORY", 1000)
    rows = rows_of(checkpoint, tmp_path, name, tokens=256, length=64)
    assert np.array_equal(rows.tokens, expected.tokens)
    assert rows.provenance[0].tokens == len(text)
    assert len(lengths) == -(-len(text) // pieces.WINDOW)
    assert max(lengths) <= pieces.WINDOW + pieces.OVERLAP
