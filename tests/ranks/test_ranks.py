"""What ranks tell each other."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import OutputError, PlanError, RankLostError
from quantkit.ranks.places import RankPlace, check_count, first_host, place_of
from quantkit.ranks.ranks import ALONE, Ranks
from quantkit.ranks.shares import shared_out
from tests.ranks.forked import on_ranks, values

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "20003",
}


def test_torchrun_and_slurm_say_which_rank_this_is() -> None:
    assert place_of({**TORCHRUN, "MASTER_ADDR": "a", "MASTER_PORT": "7"}) == RankPlace(3, 4, 1, 2, "a", 7)
    assert place_of(SLURM) == RankPlace(5, 8, 1, 4, "gpu07", 20_003)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch script itself
    ],
)
def test_a_process_alone_is_no_rank(environment: dict[str, str]) -> None:
    assert place_of(environment) is None


def test_an_environment_without_sense_is_one_line() -> None:
    with pytest.raises(PlanError, match="WORLD_SIZE='many': a number was needed"):
        place_of({**TORCHRUN, "WORLD_SIZE": "many"})


@pytest.mark.parametrize("count", [0, 3, 5, 6, 7, 16])
def test_only_counts_that_share_eight_slices(count: int) -> None:
    with pytest.raises(PlanError, match=f"{count} ranks: 1, 2, 4 or 8 was needed"):
        check_count(count)


@pytest.mark.parametrize(("hosts", "first"), [("a", "a"), ("a,b", "a"), ("n[1-3,7],b", "n1"), ("x-0[04]", "x-004")])
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@given(sizes=st.lists(st.integers(1, 100), max_size=20), count=st.sampled_from([1, 2, 4, 8]))
def test_shares_are_as_even_as_the_largest_piece_allows(sizes: list[int], count: int) -> None:
    owners = shared_out(sizes, count)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(count)]
    assert len(owners) == len(sizes)
    assert max(loads) <= sum(sizes) / count + max(sizes, default=0)
    most = -(-len(sizes) // count)
    assert all(shared_out(sizes, count, most).count(rank) <= most for rank in range(count))


def test_alone_nothing_is_exchanged() -> None:
    assert ALONE.gathered(1) == [1]
    assert ALONE.agreed(lambda: 2) == 2
    assert ALONE.of_first(lambda: 3) == 3
    assert ALONE.shared("x", 0) == "x"
    with pytest.raises(OutputError, match="full"):
        ALONE.agreed(refuse)


def refuse() -> None:
    raise OutputError("the disk is full.", hint="Free space.")


def test_values_and_tensors_arrive_as_they_were() -> None:
    """Of every dtype, empty, of no dimension, and views."""

    def work(ranks: Ranks) -> Any:
        own = torch.arange(24.0).view(2, 3, 4) + ranks.number
        given = {
            "name": ("rank", ranks.number),
            "view": own.transpose(0, 2),
            "parts": [own.bfloat16(), own.bool(), own[:0], torch.tensor(7), own.to(torch.float8_e4m3fn)],
        }
        found = ranks.shared(given, 1)
        return ranks.gathered(ranks.number), found["name"], found["view"], [part.float() for part in found["parts"]]

    wanted = torch.arange(24.0).view(2, 3, 4) + 1
    for gathered, name, view, parts in values(on_ranks(2, work)):
        assert gathered == [0, 1]
        assert name == ("rank", 1)
        assert torch.equal(view, wanted.transpose(0, 2))
        kinds = (wanted.bfloat16(), wanted.bool(), wanted[:0], torch.tensor(7), wanted.to(torch.float8_e4m3fn))
        assert all(torch.equal(part, kind.float()) for part, kind in zip(parts, kinds, strict=True))


def test_rows_go_to_whom_they_are_meant_for() -> None:
    """Row [from, to]; rank r sends r + q rows to rank q, rank 0 none to itself."""

    def work(ranks: Ranks) -> Any:
        to_each = [ranks.number + rank for rank in range(ranks.count)]
        rows = [[ranks.number, rank] for rank, count in enumerate(to_each) for _ in range(count)]
        return ranks.exchange(torch.tensor(rows, dtype=torch.bfloat16).reshape(-1, 2), to_each, to_each)

    for number, found in enumerate(values(on_ranks(4, work))):
        assert found.tolist() == [[rank, number] for rank in range(4) for _ in range(rank + number)]


def test_what_one_refuses_all_refuse_and_rank_0_says() -> None:
    first, second = on_ranks(2, lambda ranks: ranks.agreed(refuse if ranks.number == 1 else lambda: None))
    assert isinstance(first.error, OutputError)
    assert str(first.error) == "rank 1: the disk is full. Free space."
    assert isinstance(second.error, RankLostError)


def test_a_killed_rank_is_missed_at_once() -> None:
    def work(ranks: Ranks) -> Any:
        ranks.barrier()
        if ranks.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.barrier()

    start = time.monotonic()
    first, second = on_ranks(2, work)
    assert second.signal == signal.SIGKILL
    assert isinstance(first.error, RankLostError)
    assert "another rank is gone" in str(first.error)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_is_missed_after_the_timeout() -> None:
    def work(ranks: Ranks) -> Any:
        ranks.barrier()
        if ranks.number == 1:
            time.sleep(8)
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.barrier()

    first, _ = on_ranks(2, work, timedelta(seconds=3))
    assert isinstance(first.error, RankLostError)


def test_too_many_ranks_for_the_slices_are_refused_by_rank_0() -> None:
    first, *others = on_ranks(3, lambda ranks: None)
    assert "3 ranks: 1, 2, 4 or 8 was needed" in str(first.error)
    assert all(isinstance(other.error, RankLostError) for other in others)
