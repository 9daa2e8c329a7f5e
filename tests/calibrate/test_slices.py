"""Sums over tokens by slices of rows: the same bits, whoever computes which slice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibrate import stream
from quantkit.calibrate.chunk_sizes import TOKEN_SLICES, own_rows, row_slices
from quantkit.calibrate.hidden_states import MemoryRows
from quantkit.calibrate.inputs import InputMoments, InputStats, combined
from quantkit.calibrate.stream import row_batches, sliced_batches

CPU = torch.device("cpu")
LENGTH, WIDTH = 7, 48


@given(n_rows=st.integers(1, 200))
def test_slices_are_consecutive_and_even(n_rows: int) -> None:
    slices = row_slices(n_rows)
    sizes = [stop - first for first, stop in slices]
    assert [row for first, stop in slices for row in range(first, stop)] == list(range(n_rows))
    assert len(slices) == min(n_rows, TOKEN_SLICES)
    assert max(sizes) - min(sizes) <= 1


@given(n_rows=st.integers(1, 200), ranks=st.sampled_from([1, 2, 4, 8]))
def test_ranks_have_whole_slices_of_rows(n_rows: int, ranks: int) -> None:
    """All of them, each once, in order, with the slices' own numbers."""
    if n_rows < ranks:
        return
    owned = [own_rows(n_rows, rank, ranks) for rank in range(ranks)]
    assert [(own.first + first, own.first + stop) for own in owned for first, stop in own.slices] == row_slices(n_rows)
    assert [own.first_slice + place for own in owned for place in range(len(own.slices))] == [*range(min(n_rows, 8))]
    assert [own.first for own in owned] == [sum(one.count for one in owned[:rank]) for rank in range(ranks)]


def test_a_batch_of_rows_never_straddles_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_TOKENS", 3 * LENGTH)
    store = MemoryRows(37, LENGTH, 1)
    batches = list(sliced_batches(store, CPU))
    assert batches == [batch for rows in row_slices(37) for batch in row_batches(store, CPU, rows)]
    assert [row for start, stop in batches for row in range(start, stop)] == list(range(37))
    assert {stop for _, stop in row_slices(37)} <= {stop for _, stop in batches}
    assert max(stop - start for start, stop in batches) == 3


def rows_of(n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What two streams have: of very different size, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(n_rows)
    x = torch.randn(n_rows, LENGTH, WIDTH, generator=generator)
    x *= torch.randn(n_rows, 1, 1, generator=generator).mul(2).exp()
    return x, x + 0.1 * torch.randn(x.shape, generator=generator)


def sums_of(n_rows: int, rows: tuple[int, int]) -> InputMoments:
    """One slice, in batches of two rows."""
    x, original = (part[slice(*rows)] for part in rows_of(n_rows))
    moments = InputMoments(WIDTH, cross=True, device=CPU)
    for own, other in zip(x.split(2), original.split(2), strict=True):
        moments.add(own.flatten(0, 1), other.flatten(0, 1))
    return moments


def stats_of(moments: list[InputMoments]) -> InputStats:
    (stats,) = (one.stats() for one in moments)
    assert isinstance(stats, InputStats)
    return stats


def assert_equal(found: InputStats, expected: InputStats) -> None:
    assert found.n_tokens == expected.n_tokens
    assert torch.equal(found.hessian, expected.hessian)
    assert found.cross is not None
    assert expected.cross is not None
    assert torch.equal(found.cross, expected.cross)


@pytest.mark.parametrize("n_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("n_rows", [3, 8, 29, 64])
def test_any_number_of_ranks_gives_the_same_bits(n_rows: int, n_ranks: int) -> None:
    slices = row_slices(n_rows)
    alone = stats_of(combined([sums_of(n_rows, rows)] for rows in slices))
    share = TOKEN_SLICES // n_ranks
    owned = [slices[rank * share : (rank + 1) * share] for rank in range(n_ranks)]

    # Every rank computes its slices, in whatever order; one of them adds all.
    by_rank = [[sums_of(n_rows, rows) for rows in reversed(own)][::-1] for own in reversed(owned)][::-1]
    assert_equal(stats_of(combined([sums] for rank in by_rank for sums in rank)), alone)

    # Or the total goes from rank to rank.
    total: list[InputMoments] = []
    for own in owned:
        total = combined([*([total] if total else []), *([sums_of(n_rows, rows)] for rows in own)])
    assert_equal(stats_of(total), alone)

    x, _ = (part.flatten(0, 1).double() for part in rows_of(n_rows))
    torch.testing.assert_close(alone.hessian[0].double(), x.T @ x / len(x), rtol=1e-5, atol=1e-4)


def test_the_diagonal_alone_is_added_too() -> None:
    def importance(rows: tuple[int, int]) -> InputMoments:
        moments = InputMoments(WIDTH, cross=True, device=CPU, full=False)
        moments.add(rows_of(29)[0][slice(*rows)].flatten(0, 1), None)
        return moments

    (total,) = combined([importance(rows)] for rows in row_slices(29))
    assert torch.allclose(total.stats().importance[0], rows_of(29)[0].square().mean((0, 1)), rtol=1e-5)


def test_sums_of_one_slice_exist_beside_the_total() -> None:
    alive = weakref.WeakSet[InputMoments]()
    most: list[int] = []

    def slices() -> Iterator[list[InputMoments]]:
        for rows in row_slices(29):
            gc.collect()
            most.append(len(alive))
            moments = sums_of(29, rows)
            alive.add(moments)
            yield [moments]
            del moments

    combined(slices())
    assert most == [0, *[1] * (TOKEN_SLICES - 1)]
