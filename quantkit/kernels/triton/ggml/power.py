# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false, reportGeneralTypeIssues=false
"""MXFP4 on a GPU: the power of two of each block, as `quantkit.schemes.ggml.symmetric` finds it, a block to a
thread."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.ggml_constants import POWERS
from quantkit.kernels.triton.ggml.groups import SIZES, load_groups, measure, moments, range_of

_N_POWERS = tl.constexpr(len(POWERS))
_POWERS = tl.constexpr(sum((8 + power) << 4 * place for place, power in enumerate(POWERS)))
"""POWERS, 8 higher, four bits for each."""


@triton.jit(do_not_specialize=SIZES)
def search_power(
    weight, importance, table, d_out, n_groups, row_groups, n_rows, matters,
    LOW: tl.constexpr, HIGH: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """weight (B, n_rows, in) and importance (B, in), in = row_groups * K; table: see `level_of`. Fill d_out
    (n_groups,)."""
    group = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = group < n_groups
    row = group // row_groups
    x = load_groups(weight, group * K, inside, K, N)
    h = load_groups(importance, ((row // n_rows) * row_groups + (group - row * row_groups)) * K, inside, K, N)
    zero = x[0] * 0.0
    _, _, largest = range_of(x, h, zero, zero - 1.0, K)
    unit = _exponent(largest)
    # Products of huge weights overflow, those of tiny ones vanish: the largest becomes 0.5 to 1. 2**-unit itself might
    # overflow.
    first, second, scaled = _power(-unit // 2), _power(-unit - -unit // 2), ()
    for k in tl.static_range(K):
        scaled = scaled + (x[k] * first * second,)
    _, _, energy = moments(scaled, h, K)
    _, _, reach = range_of(scaled, h, zero, energy * matters, K)
    exponent = _exponent(reach) + unit
    best_error, best = zero + float("inf"), exponent
    for attempt in range(_N_POWERS):
        power = tl.minimum(tl.maximum(exponent + ((_POWERS >> 4 * attempt) & 15) - 8, -128), 126)
        error, _, _ = measure(scaled, h, _power(power - unit), table, LOW, HIGH, True, K)
        better = error < best_error
        best_error, best = tl.where(better, error, best_error), tl.where(better, power, best)
    tl.store(d_out + group, _power(best + 24) * 2.0**-24, mask=inside)  # 2**-128 is subnormal


@triton.jit
def _exponent(value):
    """Exponent of the power of two just above |value|; 0 for 0."""
    tiny = tl.abs(value) < 1e-30
    bits = (tl.abs(value) * tl.where(tiny, 2.0**64, 1.0)).to(tl.int32, bitcast=True)
    return tl.where(bits == 0, 0, (bits >> 23) - 126 - tl.where(tiny, 64, 0))


@triton.jit
def _power(exponent):
    """2**exponent, exponent within -126 to 127 (nearest)."""
    return ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)
