"""A row of a chat data set -> one conversation, checked, as the checkpoint's chat template is to be given it.

Enters: the object of a row with the keys that the common data sets have. Leaves: ChatDocument.

    messages              list of {role, content, tool_calls, reasoning_content, ...}
    tools                 list of JSON schemas of functions, or that list as JSON text
    documents             list of {title, text}, for templates that answer from documents
    chat_template_kwargs  variables of the template such as {"enable_thinking": false}

`content` is text, a list of parts {"type": "text", "text": ...}, or null beside `tool_calls`. The `arguments` of a call
are an object or JSON text. All that is wrong is a CalibrationError that names the row and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from quantkit.errors import CalibrationError
from quantkit.formats.safetensors.header import check_json_size, printable

REASONING = ("reasoning_content", "reasoning", "thinking")
_OWN_VARIABLES = ("messages", "tools", "documents")


@dataclass(frozen=True, slots=True)
class ChatDocument:
    """One conversation, to be rendered by the checkpoint's chat template. `where` names its place for messages.
    `domain`: as the row names it, or ""."""

    where: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    domain: str = ""

    def record(self) -> dict[str, Any]:
        """The row as `chat_document` reads it."""
        beside = {"tools": self.tools, "documents": self.documents, "chat_template_kwargs": self.variables}
        return {"messages": self.messages} | {key: value for key, value in beside.items() if value}

    def is_empty(self) -> bool:
        """Whether no message says anything: no text, no call of a tool, no reasoning."""
        return not any(_says_something(message) for message in self.messages)

    def text(self) -> str:
        """What the messages say, without roles."""
        return "\n".join(text for message in self.messages for text in _texts(message))


def chat_document(where: str, record: Mapping[str, object]) -> ChatDocument:
    """The conversation of a row that has the key `messages`. Raises CalibrationError that begins with ``where``."""
    messages = record["messages"]
    if not isinstance(messages, list):
        raise CalibrationError(f"{where}: messages is {_kind(messages)}, a list was needed.")
    if not messages:
        raise CalibrationError(f"{where}: messages is an empty list.")
    tools = _objects(where, "tools", record.get("tools"))
    chat = ChatDocument(
        where,
        [_message(where, f"messages[{i}]", message) for i, message in enumerate(cast("list[object]", messages))],
        tools or None,  # an empty list says that there are none
        _objects(where, "documents", record.get("documents")),
        _variables(where, record.get("chat_template_kwargs")),
    )
    encodable(where, chat.text())
    return chat


def encodable(where: str, text: str) -> str:
    """``text`` if it can be UTF-8. Raises CalibrationError that begins with ``where``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where}: holds half of a surrogate pair, which is no character.") from error
    return text


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) or any(text.strip() for text in _texts(message))


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    parts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return [text for text in (*parts, *(message.get(key) for key in REASONING)) if isinstance(text, str)]


def _message(where: str, key: str, value: object) -> dict[str, Any]:
    """The message without its null entries, `content` excepted, as transformers gives it to a template."""
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: {key} is {_kind(value)}, an object with `role` and `content` was needed.")
    entries = cast("dict[str, object]", value)
    if not isinstance(entries.get("role"), str):
        raise CalibrationError(f"{where}: {key}.role is {_kind(entries.get('role'))}, text was needed.")
    calls = _calls(where, f"{key}.tool_calls", entries.get("tool_calls"))
    if "content" not in entries and not calls:
        raise CalibrationError(f"{where}: {key} has no `content`, only {printable(', '.join(entries))}.")
    message: dict[str, Any] = {name: entry for name, entry in entries.items() if entry is not None}
    message.pop("tool_calls", None)
    message["content"] = _content(where, f"{key}.content", entries.get("content"))
    return message | {"tool_calls": calls} if calls else message


def _content(where: str, key: str, value: object) -> str | list[dict[str, Any]] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise CalibrationError(f"{where}: {key} is {_kind(value)}, text or a list of parts was needed.")
    return [_part(where, f"{key}[{i}]", part) for i, part in enumerate(cast("list[object]", value))]


def _part(where: str, key: str, value: object) -> dict[str, Any]:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: {key} is {_kind(value)}, a part with `type` and `text` was needed.")
    part: dict[str, Any] = {name: entry for name, entry in cast("dict[str, Any]", value).items() if entry is not None}
    if part.get("type", "text") != "text":
        found = printable(repr(part["type"]), 60)
        raise CalibrationError(f"{where}: {key} is a part of type {found}, only parts of type 'text' can be used.")
    if not isinstance(part.get("text"), str):
        raise CalibrationError(f"{where}: {key}.text is {_kind(part.get('text'))}, text was needed.")
    return {"type": "text"} | part


def _calls(where: str, key: str, value: object) -> list[Mapping[str, Any]]:
    calls = _objects(where, key, value) or []
    for i, call in enumerate(calls):
        function: object = call.get("function", call)
        place = f"{key}[{i}].function" if "function" in call else f"{key}[{i}]"
        if not isinstance(function, dict):
            raise CalibrationError(f"{where}: {place} is {_kind(function)}, an object was needed.")
        named = cast("dict[str, object]", function)
        if not isinstance(named.get("name"), str):
            raise CalibrationError(f"{where}: {place}.name is {_kind(named.get('name'))}, text was needed.")
        arguments = named.get("arguments")
        if isinstance(arguments, str) and arguments:
            _from_json(where, f"{place}.arguments", arguments)
        elif arguments is not None and not isinstance(arguments, (dict, list, str)):
            raise CalibrationError(f"{where}: {place}.arguments is {_kind(arguments)}, an object was needed.")
    return calls


def _objects(where: str, key: str, value: object) -> list[Mapping[str, Any]] | None:
    """A list of objects, given as such or as JSON text."""
    if isinstance(value, str):
        value = _from_json(where, key, value) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list):
        raise CalibrationError(f"{where}: {key} is {_kind(value)}, a list of objects was needed.")
    for i, item in enumerate(cast("list[object]", value)):
        if not isinstance(item, dict):
            raise CalibrationError(f"{where}: {key}[{i}] is {_kind(item)}, an object was needed.")
    return cast("list[Mapping[str, Any]]", value)


def _variables(where: str, value: object) -> Mapping[str, Any]:
    key = "chat_template_kwargs"
    if isinstance(value, str):
        value = _from_json(where, key, value) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: {key} is {_kind(value)}, an object was needed.")
    variables = cast("dict[str, Any]", value)
    if taken := [name for name in _OWN_VARIABLES if name in variables]:
        raise CalibrationError(f"{where}: {key} has the key {taken[0]}, which is a key of the row itself.")
    return variables


def _from_json(where: str, key: str, text: str) -> object:
    check_json_size(text.encode("utf-8", "surrogatepass"), f"{where}: {key}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: {key} is text, but no JSON ({printable(str(error))}).") from error


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    kinds = ((str, "text"), (dict, "an object"), (list, "a list"), ((int, float), "a number"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"of type {type(value).__name__}")
