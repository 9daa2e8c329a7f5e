"""What damage and malice do to a file: flipped bits, cuts, splices, other lengths, numbers that overflow, values of
another kind. All draws come from the caller's `random.Random`, so that a case is its seed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65_535, 65_536, 4_000_000, 99_999_999, 100_000_001),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
"""Lengths, counts and offsets at borders of integer types and of the readers' own limits."""
NAMES = (
    *("", "\0", "\n", "\x1b[31m", "../x", "/etc/passwd", "a" * 300, "é", "\u202e", "\ud800", "\U0001f600"),
    *("__metadata__", "<script>", "%s%n", "{0}", "-", "NaN"),
)
LARGEST = 1 << 20
"""Bytes that a repeated piece may come to."""

Mutation = Callable[[Random, bytearray, int], None]
"""Changes the bytes in place; the integer is a place in them."""


def flip(draw: Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << draw.randrange(8)


def replace(draw: Random, data: bytearray, at: int) -> None:
    data[at] = draw.randrange(256)


def number(draw: Random, data: bytearray, at: int) -> None:
    """A hostile integer over what stands there, of four or eight bytes."""
    code, limit = draw.choice((("<I", 2**32), ("<Q", 2**64)))
    packed = struct.pack(code, draw.choice(NUMBERS) % limit)
    data[at : at + len(packed)] = packed


def delete(draw: Random, data: bytearray, at: int) -> None:
    del data[at : at + draw.choice((1, 2, 4, 8, 64, 4096))]


def cut(draw: Random, data: bytearray, at: int) -> None:
    del data[at:]


def insert(draw: Random, data: bytearray, at: int) -> None:
    data[at:at] = draw.randbytes(draw.choice((1, 4, 8, 16)))


def splice(draw: Random, data: bytearray, at: int) -> None:
    """A piece from elsewhere in the file."""
    start = draw.randrange(len(data))
    data[at:at] = data[start : start + draw.choice((1, 4, 8, 32, 200))]


def swell(draw: Random, data: bytearray, at: int) -> None:
    """A piece of the file, over and over; rarely very often."""
    piece = data[at : at + draw.choice((1, 2, 8, 40))]
    times = draw.choice((2, 20, 300)) if draw.random() < 0.98 else LARGEST // len(piece)
    data[at:at] = piece * times


def append(draw: Random, data: bytearray, at: int) -> None:
    data += draw.randbytes(draw.choice((1, 32, 1000)))


MUTATIONS: tuple[Mutation, ...] = (flip, replace, number, delete, cut, insert, splice, swell, append)


def mutated_bytes(draw: Random, data: bytes, begin: int = 0) -> bytes:
    """One to six mutations. ``begin``: the first bytes, which hold the header, are the place (0: all)."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        if not changed:
            break
        draw.choice(MUTATIONS)(draw, changed, draw.randrange(min(len(changed), begin) or len(changed)))
    return bytes(changed)


def mutated_fields(draw: Random, fields: Sequence[bytes]) -> bytes:
    """A file that is given field by field: fields of other lengths, left out, twice, in another order; integers at
    their borders."""
    changed = list(fields)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        at = draw.randrange(len(changed))
        size = len(changed[at])
        match draw.randrange(6):
            case 0 | 1 if size in (1, 2, 4, 8):
                changed[at] = (draw.choice(NUMBERS) % 256**size).to_bytes(size, "little")
            case 2 if size in (1, 2, 4, 8):
                near = int.from_bytes(changed[at], "little") + draw.choice((-1, 1))
                changed[at] = (near % 256**size).to_bytes(size, "little")
            case 3:
                changed[at] = mutated_bytes(draw, changed[at])
            case 4:
                changed.insert(at, draw.choice(changed))
            case _:
                changed[at] = draw.choice(changed)
    return b"".join(changed)


def hostile_value(draw: Random) -> Any:
    """What a reader of JSON may not expect."""
    return draw.choice(
        (
            *(None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), "x", "", [], {}, [[]], [[[[]]]]),
            *(10**19, 10**30, 10**400, 2**63, -(2**63), [1] * 20, [0], {"a": 1}, draw.choice(NAMES)),
            *("9" * 5000, draw.choice(NUMBERS), -draw.choice(NUMBERS), [draw.choice(NUMBERS)] * 3),
        )
    )


def mutated_json(draw: Random, value: Any) -> Any:
    """A copy of a JSON value with one to three of its parts changed, renamed or left out."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        if draw.random() < 0.02:
            return hostile_value(draw)
        holder: Any = changed
        while True:
            key = _key(draw, holder)
            if key is None:
                break
            if not isinstance(holder[key], dict | list) or not holder[key] or draw.random() < 0.3:
                _change(draw, holder, key)
                break
            holder = holder[key]
    return changed


def _key(draw: Random, holder: Any) -> Any:
    """A key of an object, a place in a list; None if there is nothing in it."""
    if not holder:
        return None
    return draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))


def _change(draw: Random, holder: Any, key: Any) -> None:
    found = holder[key]
    match draw.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[draw.choice((*NAMES, *holder))] = holder.pop(key)
        case 2 if isinstance(holder, dict):
            holder[draw.choice(NAMES)] = hostile_value(draw)
        case 3 if isinstance(found, int):
            holder[key] = draw.choice((found + 1, found - 1, -found, found * 2, draw.choice(NUMBERS)))
        case _:
            holder[key] = hostile_value(draw)


def mutated_json_text(draw: Random, value: Any) -> bytes:
    """`mutated_json` as a file, some of them with damaged bytes."""
    text = json.dumps(mutated_json(draw, value), ensure_ascii=draw.random() < 0.5)
    raw = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(draw, raw) if draw.random() < 0.25 else raw


def mutated_words(draw: Random, text: str, words: Sequence[str]) -> bytes:
    """Words of a language put into a text in places that are not theirs, or alone."""
    if draw.random() < 0.4:
        return " ".join(draw.choice(words) for _ in range(draw.randrange(1, 12))).encode("utf-8", "surrogatepass")
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(words) + text[at + draw.randrange(5) :]
    return text.encode("utf-8", "surrogatepass")
