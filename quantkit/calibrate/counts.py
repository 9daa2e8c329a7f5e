"""Whole numbers as people write them: "64k", "128Ki", "1e5"."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

_COUNT = re.compile(r"(\d{1,15}(?:\.\d{1,6})?(?:e\d{1,2})?)([kmg]i?)?", re.ASCII | re.IGNORECASE)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_count(text: str) -> int:
    """131072 of "131072", "131,072", "128Ki"; 64000 of "64k"; 100000 of "1e5". Raises `ValueError` with what was found
    and what is allowed."""
    found = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    if found is None:
        raise ValueError(f"found {text[:40]!r}, needed a number such as 131072, 64k, 128Ki or 1e5")
    count = float(found[1]) * _FACTORS[(found[2] or "").lower()]
    if count != int(count) or not 1 <= count <= 10**12:
        raise ValueError(f"found {text[:40]!r}, needed a whole number from 1 to 1e12")
    return int(count)


def _count(value: object) -> object:
    """What a recipe says: a number, or text that stands for one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # YAML's 1e5
    if not isinstance(value, str):
        return value
    try:
        return parse_count(value)
    except ValueError as error:
        raise PydanticCustomError("recipe", "{text}", {"text": str(error)}) from None


TokenCount = Annotated[
    int,
    Field(ge=1, strict=True),
    BeforeValidator(_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9]"}]}),
]
