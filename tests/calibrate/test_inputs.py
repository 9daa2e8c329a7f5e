"""Moments of inputs against plain float64 sums, and the two shrinkages against their formulas."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibrate.inputs import InputMoments, InputStats, shrunk, shrunk_to_diagonal

CPU = torch.device("cpu")
WIDTH = 6


def inputs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator), torch.randn(n, WIDTH, generator=generator)


def stats_of(counts: tuple[int, ...], *, cross: bool = True) -> InputStats:
    parts = [moments(n, seed, cross=cross) for seed, n in enumerate(counts)]
    return InputStats(
        torch.cat([part.hessian for part in parts]),
        torch.cat([part.cross for part in parts if part.cross is not None]) if cross else None,
        counts,
    )


def moments(n: int, seed: int = 0, *, cross: bool = True) -> InputStats:
    x, original = inputs(n, seed)
    sums = InputMoments(WIDTH, cross=cross, device=CPU)
    for part, part_original in zip(x.split(5), original.split(5), strict=True):
        sums.add(part, part_original if cross else None)
    return sums.stats()


def test_moments_are_means_over_all_batches() -> None:
    x, original = (t.double() for t in inputs(23))
    stats = moments(23)
    assert stats.n_tokens == (23,)
    torch.testing.assert_close(stats.hessian[0].double(), x.T @ x / 23, rtol=1e-5, atol=1e-6)
    assert stats.cross is not None
    torch.testing.assert_close(stats.cross[0].double(), (original - x).T @ x / 23, rtol=1e-5, atol=1e-6)
    assert moments(23, cross=False).cross is None


def test_moments_of_no_token_are_zero() -> None:
    stats = InputMoments(WIDTH, cross=True, device=CPU).stats()
    assert stats.n_tokens == (0,)
    assert not stats.hessian.any()


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_shrunk_weights_by_tokens(strength: float) -> None:
    counts = (0, 4, 40)
    before, pooled = stats_of(counts), moments(100, 9)
    after = shrunk(stats_of(counts), pooled, strength)
    k = strength * WIDTH
    for i, n in enumerate(counts):
        for ours, own, pool in (
            (after.hessian, before.hessian, pooled.hessian),
            (after.cross, before.cross, pooled.cross),
        ):
            assert ours is not None
            assert own is not None
            assert pool is not None
            expected = own[i] if k == 0 else (n * own[i] + k * pool[0]) / (n + k)
            torch.testing.assert_close(ours[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cross", [False, True])
def test_shrunk_to_diagonal_keeps_the_diagonal_and_weakens_the_rest(cross: bool) -> None:
    counts = (0, 4, 40)
    before = stats_of(counts, cross=cross)
    after = shrunk_to_diagonal(stats_of(counts, cross=cross), 2.0)
    for i, n in enumerate(counts):
        keep = n / (n + 2.0 * WIDTH)
        diagonal = before.hessian[i].diag().diag()
        expected = diagonal + keep * (before.hessian[i] - diagonal)
        torch.testing.assert_close(after.hessian[i], expected, rtol=1e-5, atol=1e-6)
        if after.cross is not None and before.cross is not None:
            torch.testing.assert_close(after.cross[i], keep * before.cross[i], rtol=1e-5, atol=1e-6)
    untouched = shrunk_to_diagonal(stats_of(counts, cross=cross), 0.0)
    assert torch.equal(untouched.hessian, before.hessian)
