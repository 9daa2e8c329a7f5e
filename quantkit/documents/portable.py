"""Values that leave this machine in a document: no absolute paths, which tell of a person's folders and help nobody."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import cast

_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:[\\/]")


def without_folder(text: str) -> str:
    """The last part of an absolute path; all else as it is."""
    return PurePath(text.replace("\\", "/")).name or text if _ABSOLUTE.match(text) else text


def without_folders(values: dict[str, object]) -> dict[str, object]:
    """Plain values, nested at will, with `without_folder` of every text in them."""
    return {key: _portable(value) for key, value in values.items()}


def _portable(value: object) -> object:
    if isinstance(value, str):
        return without_folder(value)
    if isinstance(value, list):
        return [_portable(inner) for inner in cast("list[object]", value)]
    return without_folders(cast("dict[str, object]", value)) if isinstance(value, dict) else value
