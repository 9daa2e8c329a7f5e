"""A pass that is stopped at any point goes on by the same call, and its files are the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.hidden_states import write_exactly
from quantkit.errors import OutputError
from quantkit.sensitivity import folder as folder_module
from quantkit.sensitivity import layer_files
from quantkit.sensitivity.events import FisherEvent, FisherLayer, FisherStarted
from quantkit.sensitivity.folder import PROGRESS
from tests.convert.jobs import small_config, write_model
from tests.sensitivity.passes import fisher_pass

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 2


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 1024, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path, small_config())
    return path


@pytest.fixture(scope="module")
def unbroken(source: Path, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "pass"
    fisher_pass(source, folder, tokens)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("number", range(1 + 2 * LAYERS))
def test_stopped_at_a_border(
    number: int, source: Path, tokens: Tensor, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    seen: list[FisherEvent] = []

    def stop(event: FisherEvent) -> None:
        if len(seen) == number:
            raise Killed
        seen.append(event)

    with pytest.raises(Killed):
        fisher_pass(source, tmp_path / "pass", tokens, on_event=stop)
    assert (tmp_path / "pass" / PROGRESS).exists()
    resumed: list[FisherEvent] = []
    fisher_pass(source, tmp_path / "pass", tokens, on_event=resumed.append)
    assert contents(tmp_path / "pass") == unbroken
    started = resumed[0]
    assert isinstance(started, FisherStarted)
    # What was said is on the disk already when it is said.
    assert started.forward + started.backward == number
    assert len(resumed) == 1 + 2 * LAYERS - number


@pytest.mark.parametrize("number", range(3 * LAYERS))
def test_killed_within_a_write(
    number: int,
    source: Path,
    tokens: Tensor,
    unbroken: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of what was to be written reaches the disk."""
    calls = 0

    def torn(fd: int, view: memoryview, offset: int) -> None:
        nonlocal calls
        if calls == number:
            write_exactly(fd, view[: len(view) // 2], offset)
            raise Killed
        calls += 1
        write_exactly(fd, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(layer_files, "write_exactly", torn)
        with pytest.raises(Killed):
            fisher_pass(source, tmp_path / "pass", tokens)
    fisher_pass(source, tmp_path / "pass", tokens)
    assert contents(tmp_path / "pass") == unbroken


def test_killed_before_the_files_exist(
    source: Path, tokens: Tensor, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fisher_pass(source, tmp_path / "pass", tokens)
    assert any(path.name.endswith(".new") for path in (tmp_path / "pass").iterdir())
    fisher_pass(source, tmp_path / "pass", tokens)
    assert contents(tmp_path / "pass") == unbroken


def test_killed_between_result_and_tidying(
    source: Path, tokens: Tensor, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is there: nothing is to be done again."""
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "sync_directory", lambda path: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fisher_pass(source, tmp_path / "pass", tokens)
    assert contents(tmp_path / "pass") == unbroken


def stopped(source: Path, tokens: Tensor, folder: Path) -> None:
    def stop(event: FisherEvent) -> None:
        if isinstance(event, FisherLayer):
            raise Killed

    with pytest.raises(Killed):
        fisher_pass(source, folder, tokens, on_event=stop)


def test_another_job_is_refused(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    stopped(source, tokens, tmp_path / "pass")
    with pytest.raises(OutputError, match=r"differs from this one: seed \(found 5, needed 6\)\."):
        fisher_pass(source, tmp_path / "pass", tokens, seed=6)
    said = r"one: tokens sha256 \(found \w{12}\.\.\., needed \w{12}\.\.\.\), rows \(found 3, needed 2\)"
    with pytest.raises(OutputError, match=said):
        fisher_pass(source, tmp_path / "pass", tokens[:2])


def test_restart_begins_anew(source: Path, tokens: Tensor, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    stopped(source, tokens[:2], tmp_path / "pass")
    fisher_pass(source, tmp_path / "pass", tokens, restart=True)
    assert contents(tmp_path / "pass") == unbroken
    fisher_pass(source, tmp_path / "pass", tokens, restart=True)
    assert contents(tmp_path / "pass") == unbroken


def test_two_processes(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    def second(event: FisherEvent) -> None:
        with pytest.raises(OutputError, match="another process is working on it"):
            fisher_pass(source, tmp_path / "pass", tokens)

    fisher_pass(source, tmp_path / "pass", tokens, on_event=second)


def test_damaged_progress_is_one_line(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    stopped(source, tokens, tmp_path / "pass")
    for text in (b"", b"{", b"[]", b'{"kind": "quantkit sensitivity, unfinished", "job": 3}'):
        (tmp_path / "pass" / PROGRESS).write_bytes(text)
        with pytest.raises(OutputError) as caught:
            fisher_pass(source, tmp_path / "pass", tokens)
        assert "\n" not in caught.value.message
    (tmp_path / "pass" / PROGRESS).unlink()
    with pytest.raises(OutputError, match="neither finished nor to be resumed"):
        fisher_pass(source, tmp_path / "pass", tokens)


def test_foreign_folders_are_left_alone(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    (tmp_path / "pass").mkdir()
    (tmp_path / "pass" / "thesis.tex").write_text("x")
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"thesis\.tex, which is of no Fisher pass"):
            fisher_pass(source, tmp_path / "pass", tokens, restart=restart)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is no folder"):
        fisher_pass(source, tmp_path / "file", tokens)


@pytest.mark.parametrize("gone", [1, LAYERS])
def test_layers_that_are_gone(gone: int, source: Path, tokens: Tensor, tmp_path: Path) -> None:
    """Not made anew: what they held is not there to go on with."""
    stopped(source, tokens, tmp_path / "pass")
    for layer in range(gone):
        (tmp_path / "pass" / layer_files.file_name(layer)).unlink()
    for _ in range(2):
        with pytest.raises(OutputError, match="of the unfinished pass is gone"):
            fisher_pass(source, tmp_path / "pass", tokens)
