"""What a caller asks of the machine, checked without torch: a device by name, threads, and memory in bytes or as
"20GiB"."""

from __future__ import annotations

from quantkit.errors import PlanError
from quantkit.formats.safetensors.header import printable
from quantkit.plan.recipe_values import parse_size

DEVICES = ("auto", "cpu", "cuda")
LEAST_BUDGET = 2**28
MOST_JOBS = 1024
"""More threads than any machine has; with very many their stacks alone fill the memory."""


def check_device(device: str) -> None:
    """Raise `PlanError` for a name that is none of `DEVICES`."""
    if device not in DEVICES:
        raise PlanError(f"device {device!r}: auto, cpu or cuda was needed.")


def check_jobs(jobs: int | None) -> None:
    """Raise `PlanError` for a number of threads that is none; None is all cores."""
    if jobs is not None and (type(jobs) is not int or not 1 <= jobs <= MOST_JOBS):
        raise PlanError(f"jobs {printable(repr(jobs), 40)}: a whole number from 1 to {MOST_JOBS:,} was needed.")


def parse_budget(text: str) -> int:
    """Bytes of "20GiB". Raises `ValueError` with what was found and needed."""
    nbytes = parse_size(text)
    if nbytes < LEAST_BUDGET:
        bare = " (a number without a unit counts bytes)" if text.strip().isdecimal() else ""
        raise ValueError(f"found {text[:40]!r}, needed at least 256MiB{bare}")
    return nbytes


def budget_bytes(size: int | str | None) -> int | None:
    """Bytes of a memory budget that a caller of the library gave; None if none was given. Raises `PlanError`."""
    if size is None:
        return None
    try:
        return parse_budget(size if isinstance(size, str) else f"{size}B")
    except ValueError as error:
        raise PlanError(f"memory_budget: {error}.") from None


def cache_bytes(size: int | str | None) -> int | None:
    """The same for the disk that a cache may take, of which any is enough that holds a layer."""
    if size is None:
        return None
    try:
        return parse_size(size if isinstance(size, str) else f"{size}B")
    except ValueError as error:
        raise PlanError(f"cache: {error}.") from None
