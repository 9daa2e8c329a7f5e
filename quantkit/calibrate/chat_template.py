"""Chats -> text, by the checkpoint's own chat template, in a child process that cannot hang or eat the machine.

A chat template is a program that comes with a download. It runs in jinja2's immutable sandbox, and the sandbox alone
bounds neither time nor memory (two nested loops are enough), so the rendering runs in a child process under limits of
CPU time and address space. The child's script is template_process.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from quantkit.calibrate import template_process
from quantkit.calibrate.chats import ChatDocument

CPU_SECONDS = 10  # for start-up and compiling; each chat adds CPU_SECONDS_PER_CHAT
CPU_SECONDS_PER_CHAT = 0.01
WALL_FACTOR = 6  # a busy machine gives a process a fraction of a core


class TemplateFailure(Exception):
    """The template could not render one of the chats. `index` is the chat's place in the list, None for all of them."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


def render_chats(
    templates: Mapping[str, str],
    chats: Sequence[ChatDocument],
    special_tokens: Mapping[str, str],
    *,
    cpu_seconds: int = CPU_SECONDS,
) -> list[str]:
    """One text per chat. `special_tokens` are the template's variables such as bos_token.

    ``templates``: by name; `tool_use`, where there is one, renders the chats with tools, `default` all others. The
    clock that a template may ask for (`strftime_now`) always says 1 January 2025, so that the text does not depend on
    the day. Raises TemplateFailure: syntax or run-time error, time, memory or length above the limits.
    """
    seconds = cpu_seconds + int(CPU_SECONDS_PER_CHAT * len(chats))
    job = {
        "templates": dict(templates),
        "chats": [_variables(chat, special_tokens) for chat in chats],
        "cpu_seconds": seconds,
    }
    # -I: neither the current folder nor this one is importable in the child, so no file there can pose as a library.
    script = str(Path(template_process.__file__).resolve())
    command = [sys.executable, "-I", script, *(path for path in sys.path if path)]
    try:
        payload = json.dumps(job, default=str).encode()  # a parquet column may hold dates
    except RecursionError:
        raise TemplateFailure("a chat is nested too deeply") from None
    try:
        child = subprocess.run(command, input=payload, capture_output=True, timeout=seconds * WALL_FACTOR, check=False)
    except subprocess.TimeoutExpired:
        raise TemplateFailure(f"no end after {seconds * WALL_FACTOR} s") from None
    if child.returncode < 0:
        raise TemplateFailure(f"no end after {seconds} s of CPU time (signal {-child.returncode})")
    if child.returncode > 0:
        last_line = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise TemplateFailure(f"the rendering process failed: {last_line or child.returncode}")
    return answer_of(child.stdout)


def _variables(chat: ChatDocument, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    given = {"messages": chat.messages, "tools": chat.tools, "documents": chat.documents}
    return {**special_tokens, **chat.variables, **given}


def answer_of(stdout: bytes) -> list[str]:
    """The texts in what the child process said. Raises `TemplateFailure`."""
    answer = cast("dict[str, Any]", json.loads(stdout))
    if "error" in answer:
        raise TemplateFailure(str(answer["error"]), cast("int | None", answer["index"]))
    return [str(text) for text in answer["rendered"]]
