"""Values -> text for people: sizes, durations, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GB, GIB = 1e9, 2**30


def counted(count: int, noun: str) -> str:
    """ "1 layer", "61 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def both_units(nbytes: int) -> str:
    """ "348.91 GB (324.95 GiB)": decimal first, because disks and downloads are sold so. Below 1 GB in MB and MiB."""
    if nbytes < GB:
        return f"{nbytes / 1e6:.2f} MB ({nbytes / 2**20:.2f} MiB)"
    return f"{nbytes / GB:.2f} GB ({nbytes / GIB:.2f} GiB)"


def duration(seconds: float) -> str:
    """ "48 s", "12 min", "3 h 20 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def rough(seconds: float) -> str:
    """An estimate: whole hours from ten on."""
    return duration(seconds) if seconds < 36_000 else f"{seconds / 3600:,.0f} h"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, rule_before_last: bool = False) -> str:
    """Aligned columns, the first ``left`` to the left, the others to the right. Plain text: the same in a terminal, a
    file and a test."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["  ".join(_aligned(row, widths, left)).rstrip() for row in cells]
    rule = "-" * max(len(line) for line in lines)
    lines.insert(1, rule)
    if rule_before_last:
        lines.insert(-1, rule)
    return "\n".join(lines)


def _aligned(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    pairs = zip(row, widths, strict=True)
    return [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(pairs)]
