"""What to try after a conversion."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from quantkit.convert.events import Report

_RUNTIMES = {"vllm": "vLLM", "llama-server": "llama.cpp"}
"""By the program that serves."""


def next_text(report: Report) -> str:
    """Commands that can be pasted into the shell this one was typed in."""
    first = report.outputs[0].path
    command, path = program(), shlex.quote(str(first))
    folder = path if len(report.outputs) == 1 else shlex.quote(str(first.parent))
    lines = [
        ("next:", ""),
        (f"  {command} inspect {path}", "what the checkpoint holds"),
        (f"  cat {path}/README.md", "its model card; quantkit.json beside it has every tensor"),
        (f"  {command} report {folder}", "one HTML page: sizes, losses by layer, tokens by expert"),
        (f"  {command} recipes list", "other recipes, each a name for -r"),
    ]
    serve = [line for output in report.outputs for line in output.serve]
    lines += [(f"  {line}", f"on a machine with {_RUNTIMES.get(line.split()[0], 'its runtime')}") for line in serve]
    width = max(len(line) for line, _ in lines)
    return "\n".join(f"{line.ljust(width)}  # {why}" if why else line for line, why in lines)


def program() -> str:
    """How to call quantkit from here: by its name if that is on PATH, else by the path it was started with."""
    started = Path(sys.argv[0])
    if started.parts[-2:] == ("quantkit", "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m quantkit"
    if started.name != "quantkit" or shutil.which("quantkit") is not None:
        return "quantkit"
    return shlex.quote(str(started))
