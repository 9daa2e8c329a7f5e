"""What a caller asks of the machine, checked without torch: a device by name, and memory in bytes or as "20GiB"."""

from __future__ import annotations

import os

from quantkit.errors import PlanError
from quantkit.plan.recipe import parse_size

DEVICES = ("auto", "cpu", "cuda")
LEAST_BUDGET = 2**28
DEFAULT_SHARE = 0.6
"""Of the physical memory, when no budget is given."""


def check_device(device: str) -> None:
    """Raise `PlanError` for a name that is none of `DEVICES`."""
    if device not in DEVICES:
        raise PlanError(f"device {device!r}: auto, cpu or cuda was needed.")


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


def default_budget() -> int:
    """Bytes to stay within if no budget is given, in whole GiB: the budget is part of the job that is resumed, and a
    new kernel must not make it another one."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, round(physical * DEFAULT_SHARE / 2**30)) * 2**30
