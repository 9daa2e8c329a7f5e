"""Who takes what: pieces of work shared out by their size, the same on every rank that asks."""

from __future__ import annotations

from collections.abc import Sequence


def shared_out(sizes: Sequence[float], count: int, most: int | None = None) -> list[int]:
    """For each piece of work the rank that takes it: the largest first, each to the rank that has least so far
    (longest processing time first; Graham 1969). ``most``: pieces that one rank takes at most; ``count`` times it must
    hold all."""
    assert most is None or most * count >= len(sizes), f"{len(sizes)} pieces for {count} ranks of {most}"
    owners, loads, taken = [0] * len(sizes), [0.0] * count, [0] * count
    for piece in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        free = (rank for rank in range(count) if most is None or taken[rank] < most)
        owner = min(free, key=lambda rank: loads[rank])
        owners[piece], loads[owner], taken[owner] = owner, loads[owner] + sizes[piece], taken[owner] + 1
    return owners
