# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""The nearest level of a grid on the GPU, shared by the sweep and by the polish."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(values, zero, top, table, LEVELS: tl.constexpr):
    """values in units of their scale -> codes, levels, both float32. LEVELS: entries of the table, 0 for integers."""
    if LEVELS == 0:
        codes = tl.minimum(tl.maximum(values + zero, 0.0), top)
        codes = (codes + 12582912.0) - 12582912.0  # 1.5 * 2**23: what stays is rounded, ties to even
        levels = codes - zero
    else:
        codes = values * 0.0
        levels = values * 0.0 + tl.load(table)
        for i in tl.static_range(LEVELS - 1):
            low, high = tl.load(table + i), tl.load(table + i + 1)
            above = values > (high + low) / 2
            codes += tl.where(above, 1.0, 0.0)
            levels = tl.where(above, high, levels)
    return codes, levels


@triton.jit
def inverse(scale):
    """1 / scale; 0 for a group without extent, whose codes do not matter."""
    return tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
