"""Values of recipes as text: sizes, and the words in which a value is refused."""

from __future__ import annotations

import re

from pydantic_core import PydanticCustomError

from quantkit.plan.recipe_file import nearest

SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "5GB" (decimal), "20GiB" (binary) or "4096". Raises `ValueError` with what was found and what is
    allowed."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = SIZE_UNITS.get((found[2] or "B").upper()) if found else None
    if found is None or unit is None:
        raise ValueError(
            f"found {text[:40]!r}, needed a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 20GiB"
        )
    size = round(float(found[1]) * unit)
    if size < 1:
        raise ValueError(f"found {text[:40]!r}, needed at least one byte")
    return size


def checked_size(text: str) -> str:
    """The text, if it is a size of at least 1 MiB. Raises `fault`."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise fault(str(error)) from None
    if size < 2**20:
        raise fault(f"found {text!r}, needed at least 1MiB")
    return text


def one_of(word: str, known: tuple[str, ...]) -> str:
    """What was needed in place of ``word``, and which of it may be meant."""
    guess = nearest(word, known)
    return f"one of {', '.join(known)}" + (f" (did you mean {guess}?)" if guess else "")


def fault(text: str) -> PydanticCustomError:
    """A complete "found X, needed Y", which the loader prints as it stands."""
    return PydanticCustomError("recipe", "{text}", {"text": text})
