"""What to try after a conversion."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from quantkit.convert.events import Report
from quantkit.formats.remote.addresses import without_secrets
from quantkit.plan.gguf_model import is_gguf_model

_RUNTIMES = {"vllm": "vLLM", "llama-server": "llama.cpp"}
"""By the program that serves."""


def next_text(source: str, report: Report) -> str:
    """Commands that can be pasted into the shell this one was typed in. ``source``: what was converted. What exceeds
    the limits of its recipe is not served."""
    paths = [output.path for output in report.outputs]
    folder = paths[0] if len(paths) == 1 else paths[0].parent
    scores = f"{folder}.evaluation.json"
    evaluate = shlex.join([without_secrets(source), *map(str, paths), "-o", scores])
    scored = not is_gguf_model(Path(source))  # a reference is a folder
    page = shlex.join([str(folder), *([scores] if scored else []), "-o", f"{folder}.html"])
    lines = [
        ("next:", ""),
        (f"  cat {shlex.quote(str(paths[0] / 'README.md'))}", "the model card; quantkit.json has every tensor"),
        *([(f"  {program()} evaluate {evaluate}", "against the original, by domain and layer")] if scored else []),
        (f"  {program()} report {page}", "all of it on one HTML page"),
    ]
    serve = [line for output in report.outputs for line in output.serve if report.validated is not False]
    lines += [(f"  {line}", f"on a machine with {_RUNTIMES.get(line.split()[0], 'its runtime')}") for line in serve]
    return "\n".join(f"{line}  # {why}" if why else line for line, why in lines)


def program() -> str:
    """How to call quantkit from here: by its name if that is on PATH, else by the path it was started with."""
    started = Path(sys.argv[0])
    if started.parts[-2:] == ("quantkit", "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m quantkit"
    if started.name != "quantkit" or shutil.which("quantkit") is not None:
        return "quantkit"
    return shlex.quote(str(started))
