"""A long text -> token ids, piece by piece, with the ids of the whole.

The tokenizers package keeps offsets and strings of all tokens of a text, some 250 bytes each, so a text of many
megabytes is cut into windows that overlap. A token depends on its surroundings: on the rest of a word, on spaces around
it, on whether the text begins with it. So two windows are joined where both give the same tokens at the same places
over half of their overlap, a quarter of the overlap away from where either of them was cut. Where they disagree (a run
of one character that is longer than the overlap) the two become one window of twice the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

WINDOW = 1 << 16  # characters; a text of no more is tokenised as a whole
OVERLAP = 1 << 12


class Reader(Protocol):
    """An open text file, or a text that is read like one."""

    def read(self, n_characters: int, /) -> str:
        """The next characters, fewer at the end, "" behind it."""
        ...


class TextReader:
    """Reads a text that is in memory."""

    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0

    def read(self, n_characters: int, /) -> str:
        """The next characters."""
        begin = self._place
        self._place += n_characters
        return self._text[begin : begin + n_characters]


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """A stretch of the text. `ids` (n,) int64; `spans` (n, 2) int64: first and last + 1 character of each token.

    Tokens before `begin` belong to the window before.
    """

    text: str
    ids: NDArray[np.int64]
    spans: NDArray[np.int64]
    begin: int = 0


def read_ids(tokenizer: Tokenizer, reader: Reader) -> Iterator[NDArray[np.int64]]:
    """Ids of the text that ``reader`` gives, (n,) int64 at a time, without special tokens of the tokenizer's own."""
    held = _window(tokenizer, reader.read(WINDOW))
    n_more = WINDOW
    while more := reader.read(n_more):
        following = _window(tokenizer, held.text[-OVERLAP:] + more)
        cut = _common_cut(held, following)
        if cut is None:
            held = _window(tokenizer, held.text + more, held.begin)
            n_more = len(held.text)
            continue
        end, begin = cut
        yield held.ids[held.begin : end]
        held = _Window(following.text, following.ids, following.spans, begin)
        n_more = WINDOW
    yield held.ids[held.begin :]


def _window(tokenizer: Tokenizer, text: str, begin: int = 0) -> _Window:
    import numpy as np

    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return _Window(text, np.array(encoding.ids, dtype=np.int64), spans, begin)


def _common_cut(left: _Window, right: _Window) -> tuple[int, int] | None:
    """(number of the left window's first token that is dropped, of the right window's first that counts instead)."""
    import numpy as np

    overlap = min(OVERLAP, len(left.text))
    shift = len(left.text) - overlap  # where the right window begins, in characters of the left
    first, last = overlap // 4, overlap - overlap // 4
    left_begin, left_end = np.searchsorted(left.spans[:, 0] - shift, (first, last)).tolist()
    right_begin, right_end = np.searchsorted(right.spans[:, 0], (first, last)).tolist()
    mine, theirs = slice(left_begin, left_end), slice(right_begin, right_end)
    same = (
        left_begin < left_end
        and left_begin >= left.begin
        and np.array_equal(left.ids[mine], right.ids[theirs])
        and np.array_equal(left.spans[mine] - shift, right.spans[theirs])
    )
    return (left_begin, right_begin) if same else None
