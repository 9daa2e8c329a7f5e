"""Values -> what JSON can say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast


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
