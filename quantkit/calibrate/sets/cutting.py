"""A long text -> pieces of a bounded size that end where a reader would pause."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.calibrate.pieces import Reader

_ENDS = ("\n\n", "\n", ". ", "\u3002", " ")
"""Where a text is cut, the best place first: paragraph, line, sentence (also of Chinese and Japanese), word."""


def pieces_of(reader: Reader, most_bytes: int) -> Iterator[str]:
    """Consecutive pieces of at most ``most_bytes`` bytes of UTF-8, without the line breaks around them.

    A piece ends at the best of `_ENDS` in its second half. Holds one piece at a time; a piece of spaces alone is left
    out.
    """
    held = ""
    while True:
        held += reader.read(most_bytes + 1 - len(held))
        n_bytes = len(held.encode())
        end = len(held) if n_bytes <= most_bytes else _end(held, _prefix(held, most_bytes))
        piece, held = held[:end], held[end:]
        if piece.strip():
            yield piece.strip("\r\n")
        if n_bytes <= most_bytes:  # fewer characters than were asked for: the text is over
            return


def _prefix(text: str, most_bytes: int) -> int:
    """Characters at the head of ``text`` that take at most ``most_bytes`` bytes, at least one."""
    return max(1, len(text.encode()[:most_bytes].decode(errors="ignore")))


def _end(text: str, most: int) -> int:
    """Where to cut, behind at most ``most`` characters."""
    for mark in _ENDS:
        place = text.rfind(mark, most // 2, most)
        if place >= 0:
            return place + len(mark)
    return most
