"""``quantkit convert`` that starts its ranks, or is started as them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from quantkit.ranks.launch import Outcome, launch
from tests.convert.jobs import files_of, int4, recipe_of, write_model, write_text

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    write_text(folder / "calibration.txt")
    write_model(folder / "model", fp8=True)
    recipe = recipe_of(int4(grid=2, polish=1), tokens=352)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return folder


def command(place: Path, out: Path, *options: str) -> list[str]:
    words = ["convert", str(place / "model"), "-r", str(place / "recipe.yaml"), "-o", str(out), "--device", "cpu"]
    return [sys.executable, "-m", "quantkit", *words, *options]


def started(words: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, env={**ENVIRONMENT, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines_of(text: str) -> list[str]:
    """What is said beside progress."""
    return [line for line in text.splitlines() if line.startswith(("error:", "hint:", "interrupted", "Traceback"))]


def test_all_ranks_end_as_the_first_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["--version"]) == Outcome(0)
    assert launch(2, ["convert", "--no-such-option"]) == Outcome(2)
    assert "No such option" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--gpus", "3"), "error: 3 ranks: 1, 2, 4 or 8 was needed."),
        (("--gpus", "2", "--layers", "0"), "error: --layers: a trial runs in one process."),
        (("--gpus", "2", "--tune"), "error: tune: found with 2 ranks, runs in one process only."),
    ],
)
def test_what_cannot_be_shared_is_one_line(options: tuple[str, ...], line: str, place: Path, tmp_path: Path) -> None:
    done = started(command(place, tmp_path / "out", *options))
    _, said = done.communicate(timeout=120)
    assert done.returncode == 1
    assert lines_of(said)[0] == line
    assert sum(text.startswith("error:") for text in lines_of(said)) == 1


def test_an_address_is_read_by_one_process_only(tmp_path: Path) -> None:
    """It is refused before anything is asked of it."""
    words = ["convert", "https://name:word@host.invalid/model/", "--scheme", "w4a16", "-o", str(tmp_path / "out")]
    done = started([sys.executable, "-m", "quantkit", *words, "--gpus", "2"])
    _, said = done.communicate(timeout=120)
    assert done.returncode == 1
    assert lines_of(said)[0].startswith("error: https://host.invalid/model: found an address, needed a folder")
    assert "word" not in said


@pytest.mark.slow
def test_a_killed_rank_is_one_line_and_the_same_command_goes_on(place: Path, tmp_path: Path) -> None:
    """And so does one with another number of ranks, or started by torchrun's environment."""
    out = tmp_path / "out"
    running = started(command(place, out, "--gpus", "2"))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    end = time.monotonic() + 120
    while not journal.exists() and time.monotonic() < end:
        time.sleep(0.02)
    victims = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert len(victims) == 2
    os.kill(int(victims[1]), signal.SIGKILL)
    shown, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert shown == ""
    assert lines_of(said) == [
        "error: rank 1 was killed (SIGKILL): all ranks were stopped.",
        "hint: Give the same command again, with as many ranks or others: it goes on where it stopped.",
    ]
    place_of_rank = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    ranks = [started(command(place, out), RANK=f"{n}", LOCAL_RANK=f"{n}", **place_of_rank) for n in range(2)]
    texts = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    assert "bits per weight" in texts[0][0]
    assert texts[1] == ("", "")
    alone = started(command(place, tmp_path / "alone"))
    alone.communicate(timeout=240)
    assert files_of(out) == files_of(tmp_path / "alone")
