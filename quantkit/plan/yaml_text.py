"""YAML text -> nodes, which know their lines -> plain values. What no recipe needs is refused before it can cost much:
aliases, tags, deep nesting."""

from __future__ import annotations

import re
from typing import cast

import yaml

from quantkit.errors import RecipeError

MAX_DEPTH = 20
_WHOLE = r"[-+]?(?:0|[1-9][0-9]{0,18})"
_FRACTION = r"[-+]?(?:\.[0-9]{1,40}|[0-9]{1,40}\.[0-9]{0,40})(?:[eE][-+]?[0-9]{1,3})?"
_FLOAT = rf"{_FRACTION}|[-+]?[0-9]{{1,40}}[eE][-+]?[0-9]{{1,3}}|[-+]?\.inf|\.nan"


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are JSON's: true, null, numbers, else text. YAML 1.1 also has dates, numbers to the base
    60, and ``no`` for false."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", _WHOLE, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def compose(text: str, shown: str) -> yaml.Node | None:
    """The node tree of one document, None of an empty one. ``shown``: the file's name in messages. Raises `RecipeError`
    for what is not sound, and for aliases, tags and deep nesting."""
    try:
        _check_events(text, shown)
        return cast("yaml.Node | None", yaml.compose(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"{shown}:{mark.line + 1 if mark else 1}: is not sound YAML: {error.problem or error.context}."
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{shown}:1: is not sound YAML: {str(error).splitlines()[0]}.") from None


def construct(node: yaml.Node, shown: str) -> object:
    """Dicts, lists and scalars of a tree from `compose`."""
    loader = _Loader("")
    try:
        return cast("object", loader.construct_document(node))
    except (yaml.MarkedYAMLError, ValueError, OverflowError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise RecipeError(f"{shown}:{mark.line + 1 if mark else 1}: is not sound YAML: {problem}.") from None
    finally:
        loader.dispose()


def _check_events(text: str, shown: str) -> None:
    """Walk the event stream, which is iterative, so that nesting is known before the recursive composer runs."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        where = f"{shown}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"{where}: found a YAML anchor or alias, needed the value itself.", hint=_QUOTE)
        if getattr(event, "tag", None) not in (None, "!"):
            raise RecipeError(f"{where}: found a YAML tag, needed the plain value.", hint=_QUOTE)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecipeError(f"{where}: found more than {MAX_DEPTH} nested levels, needed a recipe.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


_QUOTE = "A value that begins with *, & or ! must stand in quotes."
