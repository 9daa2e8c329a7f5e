"""How fast this machine is: what `quantkit.plan.benchmark` found, kept in the user's cache. No torch is loaded here.

The cache is a convenience: a file that is damaged, foreign or too large counts as none, and so does a place that cannot
be written.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from quantkit.documents.speed import SpeedDocument
from quantkit.plan.plan import Plan
from quantkit.quantizers import Method
from quantkit.schemes import ChosenScheme
from quantkit.version import __version__

MAX_BYTES = 2**20
"""Largest file that is read; one has some 10 kB."""
MOST_KERNELS = 400
"""Kernels that are kept; older ones go."""

Treatment = tuple[ChosenScheme, Method]


@cache
def treatment_key(scheme: ChosenScheme, method: Method) -> str:
    """Scheme and method as a key of `SpeedDocument.kernels`."""
    return f"{scheme.model_dump_json()} {method.model_dump_json()}"


def treatments(plan: Plan) -> dict[str, Treatment]:
    """What the plan does to weights, by `treatment_key`, each once."""
    chosen = (decision.quantising for output in plan.outputs for decision in output.decisions.values())
    return {treatment_key(*pair): pair for pair in dict.fromkeys(chosen) if pair is not None}


def machine_key(device: str) -> str:
    """What the numbers depend on. ``device``: "cpu" or "cuda"."""
    versions = ", ".join(f"{name} {_version_of(name)}" for name in ("torch", "numba"))
    threads = f"{_processors()} CPUs, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')[:20]}"
    return f"{device}; {_processor()[:100]}; {threads}; quantkit {__version__}, {versions}"[:400]


def likely_device(root: Path = Path("/")) -> str:
    """What --device auto should come to, without asking torch: "cuda" if NVIDIA's driver is there and its GPUs are not
    hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return "cuda" if (root / "dev/nvidiactl").exists() and not hidden else "cpu"


def read_speed(machine: str, folder: Path | None = None) -> SpeedDocument | None:
    """What was measured on ``machine`` before, None if nothing was. ``folder``: of the cache."""
    path = _path(machine, folder)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        found = SpeedDocument.model_validate_json(text) if len(text) <= MAX_BYTES else None
    except (OSError, ValidationError):
        return None
    return found if found is not None and found.machine == machine else None


def save_speed(found: SpeedDocument, folder: Path | None = None) -> None:
    """Keep it, by one rename; nothing happens where the cache cannot be written."""
    path = _path(found.machine, folder)
    kernels = dict(list(found.kernels.items())[-MOST_KERNELS:])
    text = found.model_copy(update={"kernels": kernels}).model_dump_json(indent=1)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(path)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/quantkit``, or ``~/.cache/quantkit``."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification has relative ones ignored.
    return (named if named.is_absolute() else Path("~/.cache").expanduser()) / "quantkit"


def disk_key(source: Path | None, out: Path) -> str:
    """Of the file systems of the shards' folder (None: there are none) and of ``out``, as a key of
    `SpeedDocument.disks`."""
    read = "-" if source is None else str(existing(source).stat().st_dev)
    return f"{read} {existing(out).stat().st_dev}"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def is_complete(found: SpeedDocument, wanted: Iterable[str], disk: str) -> bool:
    """Whether nothing has to be measured any more."""
    return disk in found.disks and all(key in found.kernels for key in wanted)


def _path(machine: str, folder: Path | None) -> Path:
    digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
    return (cache_folder() if folder is None else folder) / f"speed-{digest}.json"


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def _processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _processor() -> str:
    """Model of the processor, as Linux names it."""
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
