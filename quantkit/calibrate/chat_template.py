"""Chat turns -> text, by the checkpoint's own chat template, in a child process that cannot hang or eat the machine.

A chat template is a program that comes with a download. It runs in jinja2's immutable sandbox, and the sandbox alone
bounds neither time nor memory (two nested loops are enough), so the rendering runs in a child process under limits of
CPU time and address space. This file is both: the parent's `render_chats`, and the child's script, which imports
nothing of this package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

CPU_SECONDS = 10  # for start-up and compiling; each chat adds CPU_SECONDS_PER_CHAT
CPU_SECONDS_PER_CHAT = 0.01
WALL_FACTOR = 6  # a busy machine gives a process a fraction of a core
ADDRESS_SPACE = 1 << 30  # bytes, plus BYTES_PER_INPUT_BYTE for the chats themselves
BYTES_PER_INPUT_BYTE = 16
CHARACTERS_PER_CHAT = 1 << 20  # a longer rendering is no conversation


class TemplateFailure(Exception):
    """The template could not render one of the chats. `index` is the chat's place in the list, None for all of them."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


def render_chats(
    template: str,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    special_tokens: Mapping[str, str],
    *,
    cpu_seconds: int = CPU_SECONDS,
) -> list[str]:
    """One text per chat. `special_tokens` are the template's variables such as bos_token.

    The clock that a template may ask for (`strftime_now`) always says 1 January 2025, so that the text does not depend
    on the day. Raises TemplateFailure: syntax or run-time error, time, memory or length above the limits.
    """
    seconds = cpu_seconds + int(CPU_SECONDS_PER_CHAT * len(chats))
    job = {"template": template, "chats": chats, "variables": dict(special_tokens), "cpu_seconds": seconds}
    # -I: neither the current folder nor this one is importable in the child, so no file there can pose as a library.
    command = [sys.executable, "-I", str(Path(__file__).resolve()), *(path for path in sys.path if path)]
    payload = json.dumps(job, default=str).encode()  # a parquet column may hold dates
    try:
        child = subprocess.run(command, input=payload, capture_output=True, timeout=seconds * WALL_FACTOR, check=False)
    except subprocess.TimeoutExpired:
        raise TemplateFailure(f"no end after {seconds * WALL_FACTOR} s") from None
    if child.returncode < 0:
        raise TemplateFailure(f"no end after {seconds} s of CPU time (signal {-child.returncode})")
    if child.returncode > 0:
        last_line = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise TemplateFailure(f"the rendering process failed: {last_line or child.returncode}")
    return _answer(child.stdout)


def _answer(stdout: bytes) -> list[str]:
    answer = cast("dict[str, Any]", json.loads(stdout))
    if "error" in answer:
        raise TemplateFailure(str(answer["error"]), cast("int | None", answer["index"]))
    return [str(text) for text in answer["rendered"]]


# ---------------------------------------------------------------------------------------------- the child process


def _child() -> int:
    sys.path.extend(path for path in sys.argv[1:] if path not in sys.path)
    payload = sys.stdin.buffer.read()
    job = json.loads(payload)
    _limit_resources(int(job["cpu_seconds"]), ADDRESS_SPACE + BYTES_PER_INPUT_BYTE * len(payload))
    answer = _render_all(job["template"], job["chats"], job["variables"])
    sys.stdout.buffer.write(json.dumps(answer).encode())
    return 0


def _limit_resources(cpu_seconds: int, address_space: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _render_all(source: str, chats: list[Any], variables: dict[str, str]) -> dict[str, Any]:
    from jinja2 import TemplateError

    index: int | None = None
    rendered: list[str] = []
    try:
        template = _environment().from_string(source)
        for index, messages in enumerate(chats):  # noqa: B007 - read in the handlers below
            rendered.append(_short(template.render(messages=messages, **variables)))
    except TemplateError as error:
        line = getattr(error, "lineno", None)  # a syntax error has one
        place = f" (line {line})" if line else ""
        return {"error": f"{type(error).__name__}{place}: {_one_line(error)}", "index": index}
    except MemoryError:
        return {"error": "more memory than a template may use", "index": index}
    except Exception as error:  # noqa: BLE001 - a template can raise anything that Python's operators raise
        return {"error": f"{type(error).__name__}: {_one_line(error)}", "index": index}
    return {"rendered": rendered}


def _environment() -> Any:
    """The environment that published templates are written for (block trimming, break/continue, plain JSON)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    cast("dict[str, Any]", environment.globals).update(
        raise_exception=_raise_exception,
        strftime_now=_fixed_clock,
        add_generation_prompt=False,
        tools=None,
        documents=None,
    )
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateRuntimeError

    raise TemplateRuntimeError(message)


def _fixed_clock(pattern: str) -> str:
    from datetime import date

    return date(2025, 1, 1).strftime(pattern)


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _short(text: str) -> str:
    if len(text) > CHARACTERS_PER_CHAT:
        raise ValueError(f"rendered {len(text):,} characters, a chat may have {CHARACTERS_PER_CHAT:,}")
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    sys.exit(_child())
