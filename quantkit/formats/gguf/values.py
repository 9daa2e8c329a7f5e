"""The typed key-values at the start of a GGUF file: made here, encoded here; `header` decodes them.

    {"general.architecture": string("deepseek2"), "deepseek2.block_count": u32(61), "tokenizer.ggml.tokens": strings(t)}

A key-value is a length and the key, a u32 type, and the value; an array adds the u32 type of its items and a u64 count.
Everything is little-endian. Source: ggml/include/gguf.h of llama.cpp. Arrays of arrays exist in the specification, but
llama.cpp refuses them, so they are not made here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from quantkit.errors import ConfigError

Scalar = int | float | bool | str

NUMBERS: dict[str, tuple[int, str]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
"""Kind of fixed length -> (enum gguf_type, letter of `struct`)."""
STRING_ID = 8
ARRAY_ID = 9


@dataclass(frozen=True, slots=True)
class Value:
    """One typed value. ``kind``: a key of `NUMBERS` or "string"; of the items if ``value`` is a tuple (an array).

    Two values are equal if their kind and content are, so a decoded value equals the one that was encoded.
    """

    kind: str
    value: Scalar | tuple[Scalar, ...]

    @property
    def is_array(self) -> bool:
        """Whether the file stores an array."""
        return isinstance(self.value, tuple)

    @property
    def type_name(self) -> str:
        """As messages spell it: "u32", "string", "array of string"."""
        return f"array of {self.kind}" if self.is_array else self.kind


def u8(value: int) -> Value:
    """0 to 255."""
    return Value("u8", value)


def i8(value: int) -> Value:
    """-128 to 127."""
    return Value("i8", value)


def u16(value: int) -> Value:
    """0 to 65,535."""
    return Value("u16", value)


def i16(value: int) -> Value:
    """-32,768 to 32,767."""
    return Value("i16", value)


def u32(value: int) -> Value:
    """0 to 2^32 - 1: most numbers of a model."""
    return Value("u32", value)


def i32(value: int) -> Value:
    """-2^31 to 2^31 - 1."""
    return Value("i32", value)


def u64(value: int) -> Value:
    """0 to 2^64 - 1."""
    return Value("u64", value)


def i64(value: int) -> Value:
    """-2^63 to 2^63 - 1."""
    return Value("i64", value)


def f32(value: float) -> Value:
    """Rounded to the nearest float32 at once, so that what is read back is equal."""
    return Value("f32", _float32(value))


def f64(value: float) -> Value:
    """A float64."""
    return Value("f64", float(value))


def boolean(value: bool) -> Value:
    """One byte, 0 or 1."""
    return Value("bool", value)


def string(value: str) -> Value:
    """UTF-8 with its length in bytes, no terminator."""
    return Value("string", value)


def strings(items: Iterable[str]) -> Value:
    """Array of strings."""
    return Value("string", tuple(items))


def array(kind: str, items: Iterable[int | float | bool]) -> Value:
    """Array of numbers of one kind, a key of `NUMBERS`: ``array("i32", token_types)``."""
    assert kind in NUMBERS, kind
    return Value(kind, tuple(_float32(item) for item in items) if kind == "f32" else tuple(items))


def encode_key_values(key_values: Mapping[str, Value]) -> bytes:
    """All pairs in order, without the count that stands before them.

    Raises `ConfigError` if a value does not fit its kind (2^40 as u32) or text is not valid Unicode.
    """
    return b"".join(encode_string(key) + _typed(key, value) for key, value in key_values.items())


def encode_string(text: str) -> bytes:
    """u64 length in bytes, then UTF-8."""
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _typed(key: str, value: Value) -> bytes:
    kind_id = STRING_ID if value.kind == "string" else NUMBERS[value.kind][0]
    items = cast("tuple[Scalar, ...]", value.value if value.is_array else (value.value,))
    try:
        data = _items(value.kind, items)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise ConfigError(f"GGUF key {key}: the value does not fit the type {value.type_name} ({error}).") from error
    if value.is_array:
        return struct.pack("<IIQ", ARRAY_ID, kind_id, len(items)) + data
    return struct.pack("<I", kind_id) + data


def _items(kind: str, items: tuple[Scalar, ...]) -> bytes:
    if kind == "string":
        return b"".join(encode_string(cast("str", item)) for item in items)
    return struct.pack(f"<{len(items)}{NUMBERS[kind][1]}", *items)


def _float32(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:  # refused with the key's name when it is encoded
        return value
