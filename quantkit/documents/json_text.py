"""Values -> the text of a JSON file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

_LIST = re.compile(r'\[\n(?:\s+(?:[-+.\w]+|"[^"\\]*"),?\n)+\s*\]')
"""A JSON list without lists or objects in it, an item on each line."""


def finite(value: object) -> object:
    """``value`` with null for each number that JSON has no word for (infinity; NaN, such as the standard error of a
    single window)."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: finite(item) for key, item in cast("Mapping[str, object]", value).items()}
        case list() | tuple():
            return [finite(item) for item in cast("Sequence[object]", value)]
        case _:
            return value


def json_text(document: object) -> str:
    """A document as a file: indented by one, but a list of numbers or of plain words is one line."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    # No string of JSON holds a line break, so this never matches inside one.
    return re.sub(_LIST, lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"
