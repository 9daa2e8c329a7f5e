"""The script of the child process that renders chats: JSON on stdin -> JSON on stdout. It imports nothing of this
package.

The environment is that of transformers' `apply_chat_template`, for which published templates are written. Templates
differ in the form in which they expect a message: `content` as text or as a list of parts, the arguments of a tool call
as an object or as JSON text, a null `content` left out, empty or null. transformers leaves that to the caller, vLLM
looks into the template. Here a chat is rendered in the form that transformers gives; if that fails, or the text lacks
contents or called functions, in the other forms, and the first form with the most of them is taken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NoReturn, cast

ADDRESS_SPACE = 1 << 30  # bytes, plus BYTES_PER_INPUT_BYTE for the chats themselves
BYTES_PER_INPUT_BYTE = 16
CHARACTERS_PER_CHAT = 1 << 20  # a longer rendering is no conversation


def main() -> int:
    """Render what stdin asks for."""
    sys.path.extend(path for path in sys.argv[1:] if path not in sys.path)
    payload = sys.stdin.buffer.read()
    job = json.loads(payload)
    limit_resources(int(job["cpu_seconds"]), ADDRESS_SPACE + BYTES_PER_INPUT_BYTE * len(payload))
    sys.stdout.buffer.write(json.dumps(render_all(job["templates"], job["chats"])).encode())
    return 0


def limit_resources(cpu_seconds: int, address_space: int) -> None:
    """From here on the process ends after so many seconds of CPU time, and gets no more than so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def render_all(sources: dict[str, str], chats: list[dict[str, Any]]) -> dict[str, Any]:
    """``rendered``: a text for each chat; or ``error`` and the ``index`` of the chat that it is about."""
    index: int | None = None
    rendered: list[str] = []
    try:
        environment = _environment()
        compiled = {name: environment.from_string(source) for name, source in sources.items()}
        for index, chat in enumerate(chats):  # noqa: B007 - read in the handlers below
            with_tools = chat["tools"] is not None and "tool_use" in compiled
            template = compiled["tool_use" if with_tools else "default"]
            rendered.append(_render(template.render, chat))
    except MemoryError:
        return {"error": "more memory than a template may use", "index": index}
    except Exception as error:  # noqa: BLE001 - a template can raise anything that Python's operators raise
        line = getattr(error, "lineno", None)  # a syntax error has one
        place = f" (line {line})" if line else ""
        return {"error": f"{type(error).__name__}{place}: {_one_line(error)}", "index": index}
    return {"rendered": rendered}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ----------------------------------------------------------------------------------------------- forms of a message


class _Parts(list[Any]):
    """A list that a template cannot print by mistake, which would put Python's brackets into the text."""

    def __str__(self) -> str:
        raise TypeError("a list of parts where text was needed")

    __repr__ = __str__


class _Arguments(dict[str, Any]):
    """An object that a template cannot print by mistake."""

    def __str__(self) -> str:
        raise TypeError("an object where text was needed")

    __repr__ = __str__


def _render(render: Callable[..., str], chat: dict[str, Any]) -> str:
    wanted = _said(chat["messages"])
    best, most = "", -1
    failure: Exception | None = None
    for messages in _forms(chat["messages"]):
        try:
            text = _short(render(**{**chat, "messages": messages}))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a template can raise anything that Python's operators raise
            failure = failure or error
            continue
        found = sum(piece in text for piece in wanted)
        if found > most:
            best, most = text, found
        if found == len(wanted):
            break
    if most < 0 and failure is not None:
        raise failure
    return best


def _short(text: str) -> str:
    if len(text) > CHARACTERS_PER_CHAT:
        raise ValueError(f"rendered {len(text):,} characters, a chat may have {CHARACTERS_PER_CHAT:,}")
    return text


def _said(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the text of a chat should hold: the texts of all messages, the names of all functions called."""
    said: list[str] = []
    for message in messages:
        content = message["content"]
        said += [part["text"].strip() for part in content] if isinstance(content, list) else [(content or "").strip()]
        said += [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
    return [text for text in said if text]


def _forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    contents = ("given", "text", "parts")
    arguments = ("object", "text") if any("tool_calls" in message for message in messages) else ("object",)
    nulls = ("left out", "empty", "null") if any(m["content"] is None for m in messages) else ("left out",)
    for form in product(contents, arguments, nulls):
        yield [_message(message, *form) for message in messages]


def _message(message: Mapping[str, Any], contents: str, arguments: str, nulls: str) -> dict[str, Any]:
    formed = dict(message)
    formed["content"] = _content(message["content"], contents, nulls)
    if formed["content"] is None and nulls == "left out":
        del formed["content"]
    if "tool_calls" in message:
        formed["tool_calls"] = [_call(call, arguments) for call in message["tool_calls"]]
    reasoning = next((formed[key] for key in ("reasoning_content", "thinking", "reasoning") if key in formed), None)
    # transformers gives templates the reasoning under both names.
    return formed if reasoning is None else {"thinking": reasoning, **formed, "reasoning_content": reasoning}


def _content(content: Any, contents: str, nulls: str) -> Any:
    if content is None:
        return "" if nulls == "empty" else None
    if isinstance(content, list):
        parts = cast("list[dict[str, Any]]", content)
        return "\n".join(part["text"] for part in parts) if contents == "text" else _Parts(parts)  # as vLLM joins
    return _Parts([{"type": "text", "text": content}]) if contents == "parts" else content


def _call(call: Mapping[str, Any], form: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _call(call["function"], form)}
    value: Any = call.get("arguments") or {}  # as vLLM has it
    if form == "text":
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return {**call, "arguments": text}
    value = json.loads(value) if isinstance(value, str) else value
    return {**call, "arguments": _Arguments(cast("dict[str, Any]", value)) if isinstance(value, dict) else value}


# ------------------------------------------------------------------------------------------------- the environment


def _environment() -> Any:
    """The environment of transformers: block trimming, break/continue, `generation` blocks, plain JSON."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_blocks(), "jinja2.ext.loopcontrols"]
    )
    cast("dict[str, Any]", environment.globals).update(
        raise_exception=_raise_exception,
        strftime_now=_fixed_clock,
        add_generation_prompt=False,
        dict=_new_dict,
        namespace=_namespace(),
    )
    environment.filters["tojson"] = _to_json
    return environment


def _generation_blocks() -> Any:
    """The extension for {% generation %}: marks what the model is to learn in training, and prints it like the rest."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation


def _namespace() -> Any:
    """jinja2's namespace without names that begin with an underscore, which lead into Python's own objects."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        def __init__(*arguments: Any, **entries: Any) -> None:
            self, *given = arguments
            Namespace.__init__(self)
            for name, value in dict(*given, **entries).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    return PlainNamespace


def _new_dict(*arguments: Any, **entries: Any) -> dict[Any, Any]:
    return dict(*arguments, **entries)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _fixed_clock(pattern: str) -> str:
    from datetime import datetime

    return datetime(2025, 1, 1).strftime(pattern)  # noqa: DTZ001 - a constant


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    sys.exit(main())
