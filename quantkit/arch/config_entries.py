"""What the checked configs of all families share: types of entries, and the words of their messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, cast

from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from quantkit.errors import ConfigError

Size = Annotated[int, Field(gt=0, le=2**24)]
"""A dimension. The bound keeps a damaged config.json from describing a table of tensors that no machine can list."""
Count = Annotated[int, Field(gt=0, le=2**16)]


def whole(value: object) -> object:
    """The same with 512.0 as 512 at every depth: some libraries write whole numbers so. Fields of floats take both."""
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in cast("dict[str, object]", value).items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def contradiction(text: str) -> PydanticCustomError:
    """What a validator raises for entries that do not go together."""
    return PydanticCustomError("contradiction", "{text}", {"text": text})


def config_error(
    error: ValidationError, routing_hint: str = "", called: Mapping[str, str] | None = None
) -> ConfigError:
    """One line for all faults: key, what was found, what was needed. ``routing_hint``: for faults of how experts are
    chosen; ``called``: entry -> its name in config.json, where that is another."""
    faults: list[str] = []
    keys: set[str] = set()
    for fault in error.errors(include_url=False):
        first, *inner = (str(part) for part in fault["loc"]) if fault["loc"] else ("",)
        key = ".".join(((called or {}).get(first, first), *inner))
        keys.add(key)
        if fault["type"] == "missing":
            faults.append(f"{key} is missing")
        elif key:
            message = fault["msg"][:1].lower() + fault["msg"][1:]
            faults.append(f"{key} is {repr(fault['input'])[:60]}, {message}")
        else:
            faults.append(fault["msg"])
    hint = routing_hint if keys & {"scoring_func", "topk_method"} else ""
    return ConfigError(f"config.json: {'; '.join(faults)}.", hint=hint)
