"""The folder that a conversion writes: nothing of anyone's is replaced, and a full disk costs nothing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantkit.convert.events import Event, Finished, LayerDone
from quantkit.errors import OutputError, PlanError
from quantkit.plan.forecast import forecast
from tests.convert.jobs import (
    data_free,
    decoded,
    files_of,
    int4,
    recipe_of,
    run,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
]


def test_an_existing_out_is_refused_untouched_and_replaced_only_at_the_end(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(place / "model", data_free(), out)
    before = files_of(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        run(place / "model", data_free(), out)
    assert files_of(tmp_path) == before
    old = (out / "config.json").stat().st_ino
    seen: list[bool] = []
    run(
        place / "model",
        data_free(),
        out,
        restart=True,
        on_event=lambda event: (
            seen.append((out / "config.json").stat().st_ino == old) if not isinstance(event, Finished) else None
        ),
    )
    assert all(seen)
    assert (out / "config.json").stat().st_ino != old
    assert files_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_disk_forecast_counts_every_file(place: Path, tmp_path: Path) -> None:
    """Weights are few here, so what lies beside them shows."""
    recipe, seen = data_free(), []
    expected = forecast(place / "model", recipe, base_dir=place).needs.disk_bytes

    def count(event: Event) -> None:
        files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        seen.append(sum(files))

    run(place / "model", recipe, tmp_path / "out", on_event=count)
    assert max(seen) <= expected
    beside = sum(path.stat().st_size for path in (place / "model").glob("tokenizer*"))
    assert 0 < beside < expected


def test_a_second_process_is_refused_while_the_first_lives(place: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(event: Event) -> None:
        if isinstance(event, LayerDone):
            child = os.fork()
            if child == 0:
                try:
                    run(place / "model", data_free(), tmp_path / "out", restart=event.layer == 1)
                except OutputError as error:
                    os._exit(7 if "another process is working on it" in str(error) else 8)
                os._exit(9)
            refused.append(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))

    report = run(place / "model", data_free(), tmp_path / "out", on_event=second)
    assert refused == ["7", "7", "7"]
    assert not report.resumed
    assert decoded(tmp_path / "out")


def test_a_folder_that_holds_the_source_or_the_user_is_never_replaced(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place, tmp_path / "job")
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "users" / "me").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "users" / "me"))
    before = files_of(tmp_path)
    source = tmp_path / "job" / "model"
    folders = (source, tmp_path / "job", tmp_path, tmp_path / "work", Path("../here"), Path.home(), Path.home().parent)
    for out in folders:
        for restart in (True, False):
            with pytest.raises(OutputError):
                run(source, data_free(), out, restart=restart)
    assert files_of(tmp_path) == before


def test_a_mount_point_is_refused_as_output(tmp_path: Path, place: Path) -> None:
    mounted = Path("/dev/shm")
    if not mounted.is_mount():
        pytest.skip("/dev/shm is no mount point here")
    before = sorted(mounted.iterdir())
    for restart in (True, False):
        with pytest.raises(OutputError, match="is a mount point.*-o /dev/shm/NAME"):
            run(place / "model", data_free(), mounted, restart=restart)
    assert sorted(mounted.iterdir()) == before
    assert not mounted.with_name("shm.partial").exists()


def test_a_disk_that_is_too_full_is_refused_before_anything_is_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second try with fewer tokens must not meet what the first one left."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4321))
        with pytest.raises(PlanError, match=r"out: needs .* of disk, .* has 4\.3 kB free"):
            run(place / "model", data_free(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def unbroken(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    run(place / "model", recipe_of(int4(), validated=True), out)
    return files_of(out)


@pytest.mark.parametrize("writes", [0, 1, 20, 90, 150])
def test_a_full_disk_leaves_a_job_that_goes_on(
    writes: int, place: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the n-th pwrite: of a shard's header, a kept tensor, a linear, hidden states."""
    recipe = recipe_of(int4(), validated=True)
    real, count = os.pwrite, 0

    def pwrite(*arguments: Any) -> int:
        nonlocal count
        count += 1
        return real(*arguments) if count <= writes else no_space()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match=r"full|disk|free"):
            run(place / "model", recipe, tmp_path / "out")
    assert count > writes
    assert not (tmp_path / "out").exists()
    run(place / "model", recipe, tmp_path / "out")
    assert files_of(tmp_path / "out") == unbroken


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_disk_that_is_full_from_the_start(
    call: str, place: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(int4(), validated=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_space)
        with pytest.raises(OutputError):
            run(place / "model", recipe, tmp_path / "out")
    run(place / "model", recipe, tmp_path / "out")
    assert files_of(tmp_path / "out") == unbroken
