"""How many rows are rounded together where rows hear of each other. Without torch: plans ask, too."""

from __future__ import annotations

ROW_STEPS, LEAST_ROWS = 16, 16
"""Rows go in at most so many steps, of at least so many rows each: fewer leave kernels without work."""
ALIGNED = 8
"""Rows at once are a multiple of this, for the tensor cores."""


def rows_at_once(height: int) -> int:
    """Rows that are rounded together, of ``height`` that hear of each other."""
    return max(LEAST_ROWS, -(-height // ROW_STEPS // ALIGNED) * ALIGNED)
