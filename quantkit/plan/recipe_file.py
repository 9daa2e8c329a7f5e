"""Recipe files: YAML text -> a pydantic model, every fault with file, line, key, what was found and what is allowed.

Which keys there may be, and which parts of pydantic's locations are tags of unions, is read off the model (`_walk`),
so a new method, scheme or output changes nothing here. The YAML is composed into nodes first, because only nodes know
their lines. A hostile file cannot cost much: size, depth and aliases are bounded before anything is built.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from quantkit.errors import RecipeError
from quantkit.plan.yaml_text import compose, construct

MAX_BYTES = 2**16
MAX_FAULTS = 20
"""Lines printed for one file; more are counted."""

Loc = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)


def read_model(model: type[Model], path: Path) -> Model:
    """What a YAML file says. `RecipeError` holds one line for each fault of the file."""
    return parse_model(model, _read(path), _shown(path))


def recipe_path(path_or_name: str | Path) -> Path:
    """The file meant by a path or by the name of a shipped recipe. Its folder is where relative text files are looked
    for."""
    path = Path(path_or_name)
    # A folder may well be named like a recipe: the output that it made last time.
    if path.suffix in (".yaml", ".yml") or path.is_file() or len(path.parts) != 1:
        return path
    shipped = {file.stem: file for file in shipped_recipes()}
    if path.name in shipped:
        return shipped[path.name]
    guesses = _calibrated_first(path.name, shipped)
    known = f"Did you mean {' or '.join(guesses)}?" if guesses else f"Shipped: {', '.join(shipped) or 'none'}."
    raise RecipeError(
        f"recipe {str(path_or_name)[:80]!r}: found neither a file nor a shipped recipe of that name.",
        hint=f"{known} Without a recipe: --scheme w4a16, or --preset Q4_K_M.",
    )


_USUAL = "deepseek-v3-w4a16-gptq"
"""The recipe for who does not say more than "DeepSeek V3 at 4 bits"."""


def _calibrated_first(word: str, shipped: Mapping[str, Path]) -> list[str]:
    """At most two shipped recipes with names like this: the usual one first if its name begins so, then one that is all
    but the same, then calibrated ones."""
    close = difflib.get_close_matches(word.casefold(), tuple(shipped), n=3, cutoff=0.5)
    close += [name for name in shipped if word and word.casefold() in name and name not in close]
    misspelt = difflib.get_close_matches(word.casefold(), close, n=1, cutoff=0.94)
    calibrated = [name for name in close if "calibration:" in shipped[name].read_text(encoding="utf-8")]
    usual = [_USUAL] if word and _USUAL in shipped and _USUAL.startswith(word.casefold()) else []
    return list(dict.fromkeys([*usual, *misspelt, *calibrated, *close]))[:2]


def shipped_recipes() -> list[Path]:
    """The recipe files that come with quantkit, by name: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "data" / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml"))
    return []


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of the files that hold a model, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def parse_model(model: type[Model], text: str, shown: str) -> Model:
    """What YAML ``text`` says; ``shown`` is the file's name in messages. Raises `RecipeError` as `read_model`."""
    node = _compose(model, text, shown)
    document = _Document(model, shown, node)
    value = document.value()
    if not isinstance(value, dict):
        raise RecipeError(
            f"{shown}:{_line(node)}: found {_kind(value)}, needed a mapping with the keys {_keys(model)}."
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = [document.fault(detail) for detail in _details(error)]
        faults.sort(key=lambda fault: fault[0])
        raise _all_faults([text for _, text in faults]) from None


def model_of(model: type[Model], values: Mapping[str, object]) -> Model:
    """The model of plain values, checked as those of a file are; faults are named by their keys alone."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _all_faults([_plain_fault(model, values, detail) for detail in _details(error)]) from None


def _details(error: ValidationError) -> list[ErrorDetails]:
    # A list whose entries are faulty is also reported as empty: that says nothing new.
    found = error.errors(include_url=False)
    return [detail for detail in found if detail["type"] != "too_short" or not detail["input"]]


def _plain_fault(model: type[BaseModel], values: object, detail: ErrorDetails) -> str:
    """One pydantic error by the keys that ``values`` has: its loc also holds union tags, which no key carries."""
    path: list[int | str] = []
    keys = _keys_of(model, detail["loc"])
    for place, part in enumerate(keys):
        if isinstance(values, Mapping) and part in values:
            values = cast("Mapping[object, object]", values)[part]
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = cast("Sequence[object]", values)[part]
        elif place < len(keys) - 1:
            continue
        path.append(part)
    return f"{_dotted(tuple(path)) or 'recipe'}: {_found_needed(model, detail)}."


def _all_faults(lines: list[str]) -> RecipeError:
    lines = list(dict.fromkeys(lines))
    if len(lines) > MAX_FAULTS:
        lines[MAX_FAULTS:] = [f"... and {len(lines) - MAX_FAULTS} more faults."]
    return RecipeError(
        "\n".join(lines),
        hint="`quantkit docs recipe` explains the keys; `quantkit recipes schema` lets an editor complete the file.",
    )


def _read(path: Path) -> str:
    shown = _shown(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for
            raise RecipeError(f"{shown}: is not a regular file, needed a YAML file.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(
            f"{shown}: no such file.", hint="`quantkit recipes list` names the shipped recipes."
        ) from None
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read ({error.strerror}).") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{shown}: found more than {MAX_BYTES:,} bytes, needed a recipe (a YAML file of a few kB).")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{shown}:{line}: found bytes that are not UTF-8, needed UTF-8 text.") from None


def _compose(model: type[BaseModel], text: str, shown: str) -> yaml.Node:
    node = compose(text, shown)
    if node is None:
        raise RecipeError(f"{shown}:1: found an empty file, needed a mapping with the keys {_keys(model)}.")
    return node


@dataclass(frozen=True, slots=True)
class _Document:
    """A composed file: its plain value, and the line of each key."""

    model: type[BaseModel]
    shown: str
    root: yaml.Node

    def value(self) -> object:
        """Dicts, lists and scalars as `construct` gives them; `RecipeError` for duplicate keys and keys that are
        no text."""
        duplicates = [fault for _, fault in sorted(self._duplicates(self.root, ()))]
        if duplicates:
            raise _all_faults(duplicates)
        return construct(self.root, self.shown)

    def _duplicates(self, node: yaml.Node, path: Loc) -> Iterator[tuple[int, str]]:
        if isinstance(node, yaml.SequenceNode):
            for place, item in enumerate(node.value):
                yield from self._duplicates(item, (*path, place))
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, item in node.value:
                line = _line(key)
                where = f"{self.shown}:{line}: "
                if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    yield line, f"{where}{_dotted(path) or 'recipe'}: found a key that is not text, needed a name."
                    continue
                name = str(key.value)
                if name in seen:
                    first = seen[name]
                    yield (
                        line,
                        f"{where}{_dotted((*path, name))}: found the key twice (also line {first}), needed it once.",
                    )
                seen.setdefault(name, line)
                yield from self._duplicates(item, (*path, name))

    def fault(self, detail: ErrorDetails) -> tuple[int, str]:
        """Line number and full text of one pydantic error."""
        path, line = self._resolve(detail["loc"])
        key = _dotted(path) or "recipe"
        return line, f"{self.shown}:{line}: {key}: {_found_needed(self.model, detail)}."

    def _resolve(self, loc: Loc) -> tuple[Loc, int]:
        """The path that exists in the file, and its line. Pydantic's loc also holds union tags ("gptq"), which no key
        carries."""
        node, line, keys = self.root, _line(self.root), _keys_of(self.model, loc)
        path: list[int | str] = []
        for place, part in enumerate(keys):
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = _line(node)
                path.append(part)
            elif isinstance(node, yaml.MappingNode):
                pair = next(((key, item) for key, item in node.value if key.value == part), None)
                if pair is not None:
                    line, node = _line(pair[0]), pair[1]
                    path.append(part)
                elif place == len(keys) - 1:
                    path.append(part)  # a missing key: the line of the mapping it is missing from
        return tuple(path), line


# --- what the model admits at a place of pydantic's loc ---------------------------------------------------------------

Models = tuple[type[BaseModel], ...]
"""The models that a value may be: one, or the members of a union."""


def _walk(model: type[BaseModel], loc: Loc) -> Iterator[tuple[bool, Models]]:
    """For each part of loc: whether it is the tag of a union's member, and what the value that it leads to may be."""
    models: Models = (model,)
    for part in loc:
        is_union = len(models) > 1 and isinstance(part, str)
        tagged = tuple(one for one in models if is_union and part in _literals(one))
        if tagged:
            models = tagged
        elif isinstance(part, str):
            fields = [one.model_fields[part].annotation for one in models if part in one.model_fields]
            models = tuple(inner for field in fields for inner in _models_in(field))
        yield bool(tagged), models


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, inside whatever lists, unions and metadata."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _literals(model: type[BaseModel], key: str = "") -> tuple[object, ...]:
    """Values of the model's literal fields, or of one of them: among them is the tag of a union's member."""
    fields = [field.annotation for name, field in model.model_fields.items() if key in ("", name)]
    return tuple(value for field in fields if get_origin(field) is Literal for value in get_args(field))


def _keys_of(model: type[BaseModel], loc: Loc) -> Loc:
    """loc without the tags of unions."""
    return tuple(part for part, (is_tag, _) in zip(loc, _walk(model, loc), strict=True) if not is_tag)


def _models_at(model: type[BaseModel], loc: Loc) -> Models:
    """What the value at loc may be; () for one without keys of its own."""
    return [models for _, models in _walk(model, loc)][-1] if loc else (model,)


def _found_needed(model: type[BaseModel], detail: ErrorDetails) -> str:
    """``found X, needed Y`` for one pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    found = f"found {_value(detail['input'])}"
    if kind == "recipe":
        return detail["msg"]
    if kind == "missing":
        return "found nothing, needed this key"
    if kind == "extra_forbidden":
        *parent, key = detail["loc"]
        known = tuple(key for one in _models_at(model, tuple(parent))[:1] for key in one.model_fields)
        guess = nearest(str(key), known)
        return (
            "found an unknown key, needed "
            + (f"{guess} " if guess else "a known one ")
            + f"(allowed: {', '.join(known)})"
        )
    if kind in ("literal_error", "enum"):
        return f"{found}, needed one of the allowed values {_allowed(context['expected'], detail['input'])}"
    if kind == "union_tag_invalid":
        allowed = _allowed(context["expected_tags"], context["tag"])
        return f"found {_value(context['tag'])}, needed one of the allowed values {allowed}"
    if kind == "union_tag_not_found":
        key = str(context["discriminator"]).strip("'")
        members = [tag for one in _models_at(model, detail["loc"]) for tag in _literals(one, key)]
        return f"found no key {key!r}, needed it (allowed: {', '.join(map(repr, members))})"
    if kind in _NEEDED:
        return f"{found}, needed {_NEEDED[kind]}"
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{found}, needed {message[:1].lower()}{message[1:]}"


def _allowed(expected: str, found: object) -> str:
    """pydantic's list of quoted values, and which of them may be meant."""
    guess = nearest(found, tuple(re.findall(r"'([^']+)'", expected))) if isinstance(found, str) else None
    return f"(allowed: {expected})" + (f" (did you mean {guess}?)" if guess else "")


_NEEDED = {
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "too_short": "at least one entry",
    "string_type": "text",
    "int_type": "a whole number",
}


def nearest(word: str, known: tuple[str, ...]) -> str | None:
    """The known word that ``word`` was probably meant to be, whatever its case."""
    folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), tuple(folded), n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _dotted(path: Loc) -> str:
    """outputs[0].rules[2].scheme"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_value(part, bare=True)}" for part in path)
    return text.removeprefix(".")


def _value(value: object, *, bare: bool = False) -> str:
    """A value as a message shows it: short, on one line."""
    if isinstance(value, dict | list | tuple):
        return _kind(cast("object", value))
    if value is None:
        return "null"
    shown = str(value) if bare else repr(value)
    shown = shown if shown.isprintable() else ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return _value(value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shown(path: Path) -> str:
    shown = str(path)
    return shown if shown.isprintable() else ascii(shown)
