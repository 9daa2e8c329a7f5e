"""Moments of inputs against plain float64 sums, and the two shrinkages against their formulas."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibrate.inputs import (
    InputImportance,
    InputMoments,
    InputStats,
    shrunk,
    shrunk_to_diagonal,
)

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


# ------------------------------------------------------------------------------------- heads, and importance alone

HEADS = 3


def head_inputs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, n, WIDTH, generator=generator), torch.randn(HEADS, n, WIDTH, generator=generator)


@pytest.mark.parametrize("cross", [False, True])
def test_heads_have_moments_of_their_own(cross: bool) -> None:
    """Against a loop over heads and tokens."""
    x, original = head_inputs(23)
    sums = InputMoments.like(x, cross=cross)
    for part, part_original in zip(x.split(5, 1), original.split(5, 1), strict=True):
        sums.add(part, part_original if cross else None)
    stats = sums.stats()
    assert isinstance(stats, InputStats)
    assert stats.n_tokens == (23,) * HEADS
    assert (stats.cross is None) == (not cross)
    for head in range(HEADS):
        hessian, drift = (torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
        for token in range(23):
            row = x[head, token].double()
            hessian += torch.outer(row, row) / 23
            drift += torch.outer(original[head, token].double() - row, row) / 23
        torch.testing.assert_close(stats.hessian[head].double(), hessian, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.importance[head].double(), hessian.diagonal(), rtol=1e-5, atol=1e-6)
        if stats.cross is not None:
            torch.testing.assert_close(stats.cross[head].double(), drift, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_methods_that_need_no_more_get_mean_squares_alone(heads: int) -> None:
    x = head_inputs(23)[0][:heads]
    given = x if heads > 1 else x[0]
    full, diagonal = (InputMoments.like(given, cross=True, full=full) for full in (True, False))
    for sums in (full, diagonal):
        for part in given.split(5, -2):
            sums.add(part, part)
    found, expected = diagonal.stats(), full.stats()
    assert isinstance(found, InputImportance)
    assert found.n_tokens == expected.n_tokens == (23,) * heads
    assert found.importance.shape == (heads, WIDTH)
    torch.testing.assert_close(found.importance, expected.importance, rtol=1e-5, atol=1e-6)


def importance_of(counts: tuple[int, ...]) -> InputImportance:
    sums = InputMoments(WIDTH, cross=False, device=CPU, full=False, matrices=len(counts))
    for number, n in enumerate(counts):
        sums.add(inputs(n, number)[0], None, number)
    stats = sums.stats()
    assert isinstance(stats, InputImportance)
    return stats


def importance(n: int, seed: int) -> InputImportance:
    sums = InputMoments(WIDTH, cross=False, device=CPU, full=False)
    sums.add(inputs(n, seed)[0], None)
    stats = sums.stats()
    assert isinstance(stats, InputImportance)
    return stats


def test_a_batch_of_experts_is_one_row_each() -> None:
    counts = (0, 4, 40)
    sums = InputMoments(WIDTH, cross=True, device=CPU, matrices=len(counts))
    for number, n in enumerate(counts):
        x, original = inputs(n, number)
        sums.add(x, original, number)
    whole, full, alone = importance_of(counts), sums.stats(), stats_of(counts)
    assert whole.n_tokens == full.n_tokens == counts
    assert isinstance(full, InputStats)
    assert full.cross is not None
    assert alone.cross is not None
    torch.testing.assert_close(full.hessian, alone.hessian, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full.cross, alone.cross, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.importance, full.importance, rtol=1e-5, atol=1e-6)
    assert not whole.importance[0].any()


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_importance_is_shrunk_as_the_diagonal_of_moments(strength: float) -> None:
    counts = (0, 4, 40)
    found = shrunk(importance_of(counts), importance(100, 9), strength)
    expected = shrunk(stats_of(counts), moments(100, 9), strength)
    assert isinstance(found, InputImportance)
    torch.testing.assert_close(found.importance, expected.importance, rtol=1e-5, atol=1e-6)
    assert torch.equal(shrunk_to_diagonal(importance_of(counts), strength).importance, importance_of(counts).importance)
