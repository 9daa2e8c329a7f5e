"""A conversion on several ranks has the bytes of one process, killed or not, and whoever goes on with it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibrate.hidden_states import FileRows
from quantkit.convert import hidden as hidden_module
from quantkit.convert import opening as opening_module
from quantkit.convert import together as together_module
from quantkit.convert.events import Report
from quantkit.convert.journal import Journal
from quantkit.errors import OutputError, PlanError, RankLostError
from quantkit.on_ranks import convert_on_ranks
from quantkit.plan import machine as machine_module
from quantkit.plan.batch_sizes import Share, share_on_ranks
from quantkit.plan.recipe import Recipe
from quantkit.ranks.ranks import Ranks
from tests.convert.jobs import BUDGET, data_free, files_of, int4, recipe_of, write_model, write_text
from tests.ranks.forked import Ended, on_ranks, values

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
]
NANO = Path(__file__).resolve().parents[2] / "examples" / "nano-deepseek-v3"
TOKENS = 352
"""Eleven rows: slices and ranks have unlike numbers of them."""
CALIBRATION = {
    "data": ["calibration.txt"],
    "tokens": TOKENS,
    "sequence_length": 32,
    "min_expert_tokens": 190,  # some experts borrow
}
RECIPE = recipe_of(
    int4(grid=2, polish=1),
    others={"second": [int4("role:expert", kind="rtn", grid=2)]},
    calibration=CALIBRATION,
)
SEED = 20261201
KILLS = 4
OPERATIONS = 200
"""A rank does 207 at least in an unbroken run, one of two up to 355."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_text(folder / "calibration.txt")
    write_model(folder / "model", fp8=True)
    return folder


def converted(count: int, place: Path, recipe: Recipe, out: Path, **options: Any) -> list[Ended]:
    """Convert on so many ranks."""

    def work(ranks: Ranks) -> bool:
        return share(ranks, place, recipe, out, **options) is None

    return on_ranks(count, work)


def share(ranks: Ranks, place: Path, recipe: Recipe, out: Path, **options: Any) -> Report | None:
    chosen: dict[str, Any] = {"memory_budget": 8 * BUDGET, "base_dir": place, **options}
    return convert_on_ranks(place / "model", recipe, out, ranks, **chosen)


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    values(converted(1, place, RECIPE, out))
    return files_of(out)


@pytest.mark.parametrize("count", [2, 4])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(
    count: int, place: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """Not of one file, the report of the conversion included. Rank 0 alone has a report."""
    without_report = values(converted(count, place, RECIPE, tmp_path / "out"))
    assert without_report == [rank > 0 for rank in range(count)]
    assert files_of(tmp_path / "out") == alone
    assert not (tmp_path / "out.partial").exists()


def test_so_it_is_with_hidden_states_on_disk(
    place: Path, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks have one folder for their scratch files, and one expert at a time."""
    files: list[Path] = []

    def no_room(*given: Any) -> Share:
        return replace(share_on_ranks(*given), stores=0, experts_at_once=1)

    monkeypatch.setattr(opening_module, "share_on_ranks", no_room)
    monkeypatch.setattr(machine_module, "FileRows", lambda path, *given: files.append(path) or FileRows(path, *given))

    def work(ranks: Ranks) -> set[str]:
        share(ranks, place, RECIPE, tmp_path / "out")
        return {path.name for path in files}

    first, second = values(on_ranks(2, work))
    assert first
    assert second
    assert first.isdisjoint(second)
    assert files_of(tmp_path / "out") == alone


@pytest.mark.parametrize("count", [2, 4])
def test_so_it_is_without_calibration(count: int, place: Path, tmp_path: Path) -> None:
    values(converted(1, place, data_free(), tmp_path / "alone"))
    values(converted(count, place, data_free(), tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


@pytest.mark.slow
def test_so_it_is_of_gguf_with_its_imatrix(tmp_path: Path) -> None:
    """The trained small model: layers, heads and super-blocks of 256."""
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "calibration": {"data": ["builtin:mixed"], "tokens": 768, "sequence_length": 256},
            "outputs": [{"name": "Q4_K_M", "format": "gguf", "preset": "Q4_K_M"}],
        }
    )
    (tmp_path / "model").symlink_to(NANO)
    for count in (1, 2):
        values(converted(count, tmp_path, recipe, tmp_path / f"{count}"))
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert "imatrix.gguf" in one
    assert one == two


# ------------------------------------------------------------------------------------------------------------- kills


@dataclass
class Killer:
    """Kills rank ``victim`` before its operation number ``at``: an exchange, a write or a line of the journal."""

    victim: int
    at: int
    seen: int = 0

    def arm(self, patch: pytest.MonkeyPatch, number: int) -> None:
        """In a rank, before it works."""
        patch.setattr(hidden_module, "SAVING_PAUSE", 0)  # every border is saved
        if number != self.victim:
            return
        for owner, name in (
            (os, "pwrite"), (os, "fsync"), (Journal, "append"), (Ranks, "gathered"), (Ranks, "shared"),
            (Ranks, "exchange"), (Ranks, "send"), (Ranks, "receive"), (Path, "replace"),
        ):  # fmt: skip
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return operation


def attempt(count: int, place: Path, out: Path, killer: Killer) -> list[Ended]:
    def work(ranks: Ranks) -> int:
        with pytest.MonkeyPatch.context() as patch:
            killer.arm(patch, ranks.number)
            share(ranks, place, RECIPE, out)
        return killer.seen

    return on_ranks(count, work)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_rank_ends_all_and_any_number_goes_on(
    number: int, place: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL of a random rank at a random operation. Another is killed in the second run, now and then."""
    draw, out = random.Random(SEED + number), tmp_path / "out"
    for _ in range(draw.choice([1, 1, 2])):
        count = draw.choice([2, 4])
        victim = draw.randrange(count)
        killer = Killer(victim, draw.randint(1, OPERATIONS))
        for rank, ended in enumerate(attempt(count, place, out, killer)):
            if rank == victim:
                assert ended.signal == signal.SIGKILL or out.exists()  # a resumed run has fewer operations
            else:
                assert ended.error is None or isinstance(ended.error, RankLostError)
        if out.exists():
            break
    if not out.exists():
        values(converted(draw.choice([1, 2, 4]), place, RECIPE, out))
    assert files_of(out) == alone


# --------------------------------------------------------------------------------------------------- refused at first


def refused(ended: list[Ended]) -> str:
    """What rank 0 says; the others say nothing."""
    first, *others = ended
    assert isinstance(first.error, PlanError | OutputError)
    assert all(isinstance(other.error, RankLostError) for other in others)
    assert "\n" not in str(first.error)
    return str(first.error)


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (
            recipe_of(int4(), {**int4("role:mtp")}),
            "calibrated MTP layers: found with 2 ranks, runs in one process only",
        ),
        (recipe_of(int4(kind="rtn") | {"method": {"kind": "awq"}}), "a method that rescales channels"),
        (recipe_of(int4(), tokens=32), "1 rows of calibration text for 2 ranks: each needs one"),
    ],
)
def test_what_does_not_run_on_several_ranks_is_refused(recipe: Recipe, line: str, place: Path, tmp_path: Path) -> None:
    assert line in refused(converted(2, place, recipe, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    (first, second) = converted(2, tmp_path, RECIPE, tmp_path / "out")
    assert first.error is not None
    assert "model" in str(first.error)
    assert isinstance(second.error, RankLostError)


def test_ranks_with_other_recipes_or_threads_are_refused(place: Path, tmp_path: Path) -> None:
    other = recipe_of(int4(grid=3, polish=1), calibration=CALIBRATION)

    def with_other_recipe(ranks: Ranks) -> None:
        share(ranks, place, RECIPE if ranks.first else other, tmp_path / "out")

    def with_other_threads(ranks: Ranks) -> None:
        share(ranks, place, RECIPE, tmp_path / "out", jobs=1 + ranks.number)

    assert "rank 1: another job than rank 0's: recipe (" in refused(on_ranks(2, with_other_recipe))
    assert "threads (2, rank 0 has 1)" in refused(on_ranks(2, with_other_threads))
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_that_another_host_does_not_see_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has a folder of its own under the same name, as on hosts that share none."""
    monkeypatch.setattr(together_module, "PATIENCE_S", 0.2)

    def work(ranks: Ranks) -> None:
        (tmp_path / f"host{ranks.number}").mkdir()
        os.chdir(tmp_path / f"host{ranks.number}")
        share(ranks, place, RECIPE, Path("out"))

    line = refused(on_ranks(2, work))
    assert "rank 1: out.partial: what rank 0 writes there is not seen here" in line
    assert not any((tmp_path / "host1").iterdir())
