"""Hardware as numbers, for plans that are made without torch: a GPU by its name, and the memory that this machine
grants by default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.runtimes.gpus import parse_gpus

DEFAULT_SHARE = 0.6
"""The share of the memory that this process may use which is the budget when none is given."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that computes a conversion. ``nbytes``: its memory; ``kernels``: whether the Triton kernels run there,
    which compute in bfloat16."""

    name: str
    nbytes: int
    kernels: bool = True


@dataclass(frozen=True, slots=True)
class Hardware:
    """``budget``: bytes of RAM that the process should stay under, interpreter and torch apart; ``gpu``: None if the
    processor computes."""

    budget: int
    gpu: Gpu | None = None


def parse_gpu(text: str) -> Gpu:
    """ "H200-141GB" -> `Gpu`. Raises `ValueError` with what was found and needed."""
    try:
        found = parse_gpus(f"1x{text.strip()}")
    except ValueError as error:
        needed = str(error).partition(", needed ")[2].replace("COUNTxNAME", "NAME").replace("5xA100", "A100")
        raise ValueError(f"found {text[:40]!r}, needed {needed.replace('1x', '')}") from None
    return Gpu(found.name, found.total_bytes)


def default_budget(root: Path = Path("/")) -> int:
    """`DEFAULT_SHARE` of the least of physical memory and the limits of this process's control groups, in whole GiB.
    ``root``: where /proc and /sys lie."""
    # In whole GiB: the budget is part of the job, and a new kernel must not make it another one.
    return max(1, round(usable_memory(root) * DEFAULT_SHARE / 2**30)) * 2**30


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: of RAM, or what a container or a job scheduler allows if that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_control_group_limits(root)])


def _control_group_limits(root: Path) -> Iterator[int]:
    """Memory limits of this process's group and of all groups above it, of both versions of control groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # not Linux, or no /proc
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            yield from _limits_up_the_tree(mounted, path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_up_the_tree(mounted / "memory", path, "memory.limit_in_bytes")


def _limits_up_the_tree(top: Path, path: str, name: str) -> Iterator[int]:
    """A container may see its own group as the top, whatever path /proc names: folders that are not there are passed
    over."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        try:
            text = (top.joinpath(*parts[:depth]) / name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdecimal() and int(text) > 0:  # "max": no limit; version 1 writes a number beyond any memory
            yield int(text)
