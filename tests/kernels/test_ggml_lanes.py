"""Lanes compute what numpy computes, element by element."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.kernels.numba.lanes import (
    absolute,
    fma,
    half,
    kernel,
    least,
    load,
    most,
    rint,
    splat,
    store,
    store_bytes,
    where_less,
)

SEVERAL = np.array(
    [0, -0.5, 0.5, 1.5, 2.5, -1.5, 1e-8, 6e-8, 65504, 65520, 1e30, -1e-40, 0.1, 3.7, -7, 1e-3], np.float32
)


@kernel
def _compute(first: np.ndarray, second: np.ndarray, out: np.ndarray, codes: np.ndarray) -> None:
    a, b = load(first, 0), load(second, 0)
    store(out[0], 0, a + b)
    store(out[1], 0, a - b)
    store(out[2], 0, a * b)
    store(out[3], 0, a / b)
    store(out[4], 0, fma(a, b, splat(1.0)))
    store(out[5], 0, rint(a))
    store(out[6], 0, absolute(a))
    store(out[7], 0, least(a, b))
    store(out[8], 0, most(a, b))
    store(out[9], 0, half(a))
    store(out[10], 0, where_less(a, b, 2.0 * a, 1.0 - b))
    store(out[11], 0, load(first, 16))
    store_bytes(codes, 0, least(absolute(rint(a)), splat(255.0)))


@pytest.fixture(scope="module")
def computed() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    first, second = np.concatenate([SEVERAL, SEVERAL + 1]), SEVERAL[::-1] + np.float32(2.25)
    out, codes = np.zeros((12, 16), np.float32), np.zeros(16, np.uint8)
    _compute(first, second, out, codes)
    return first[:16], second, out, codes


def test_arithmetic(computed):
    a, b, out, _ = computed
    for got, wanted in zip(out, (a + b, a - b, a * b, a / b), strict=False):
        np.testing.assert_array_equal(got, wanted)


def test_fma_rounds_once(computed):
    a, b, out, _ = computed
    moderate = np.abs(a * b) < 1e6  # there float64 computes exactly enough
    wanted = (a.astype(np.float64) * b.astype(np.float64) + 1).astype(np.float32)
    np.testing.assert_array_equal(out[4][moderate], wanted[moderate])


def test_functions(computed):
    a, b, out, codes = computed
    wanted = np.rint(a), np.abs(a), np.minimum(a, b), np.maximum(a, b)
    for got, value in zip(out[5:9], wanted, strict=True):
        np.testing.assert_array_equal(got, value)
    np.testing.assert_array_equal(out[10], np.where(a < b, 2 * a, 1 - b))
    np.testing.assert_array_equal(out[11], SEVERAL + 1)
    np.testing.assert_array_equal(codes, np.minimum(np.abs(np.rint(a)), 255).astype(np.uint8))


def test_half_is_float16(computed):
    a, _, out, _ = computed
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out[9], a.astype(np.float16).astype(np.float32))
