"""OUT.partial: one living owner, nothing overwritten without leave, one rename at the end, killed at any moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from quantkit.convert import folder as folder_module
from quantkit.convert.folder import OutputFolder
from quantkit.errors import OutputError


def fill(folder: OutputFolder, text: str) -> None:
    folder.journal.write_text("{}\n")
    (folder.result / "weights").write_text(text)
    (folder.result / "quantkit.json").write_text("{}\n")


def publish(out: Path, text: str, *, restart: bool = False) -> None:
    with OutputFolder(out, restart=restart) as folder:
        fill(folder, text)
        folder.publish()


def test_publish_gives_the_result_its_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path / "new" / "out", "a")
    assert (tmp_path / "new" / "out" / "weights").read_text() == "a"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_out_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        publish(out, "old")
    elif kind == "empty folder":
        out.mkdir()
    else:
        out.symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"out: exists already\. .*--restart"):
        OutputFolder(out, restart=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if kind == "folder":
        assert (out / "weights").read_text() == "old"


@pytest.mark.parametrize("kind", ["folder", "empty folder", "dangling link", "link"])
def test_restart_replaces_only_at_the_end(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.old").mkdir()  # somebody else's
    if kind == "folder":
        publish(out, "old")
    elif kind == "file":
        out.write_text("old")
    else:
        out.symlink_to("elsewhere" if kind == "link" else "nowhere")
    with OutputFolder(out, restart=True) as folder:
        fill(folder, "new")
        assert os.path.lexists(out)
        assert not (out / "weights").exists() or (out / "weights").read_text() == "old"
        folder.publish()
    assert (out / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out", "out.old"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("kind", ["a file", "a folder", "a folder of results and something else"])
def test_restart_deletes_nothing_that_is_no_result(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = out if kind == "a file" else out / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    if "results" in kind:
        publish(out / "first", "old")
    with pytest.raises(OutputError, match="out: is no folder that quantkit made, and --restart would delete it"):
        OutputFolder(out, restart=True)
    assert kept.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_restart_replaces_a_result_of_several_outputs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("int4", "q4"):
        publish(out / name, "old")
    publish(out, "new", restart=True)
    assert sorted(path.name for path in out.iterdir()) == ["quantkit.json", "weights"]


def test_a_restart_that_was_stopped_goes_on_without_restart_and_still_replaces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    with OutputFolder(out, restart=True) as folder:
        fill(folder, "new")
    with OutputFolder(out, restart=False) as folder:
        assert (folder.result / "weights").read_text() == "new"
        folder.publish()
    assert (out / "weights").read_text() == "new"


def test_restart_discards_an_unfinished_job(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", restart=False) as folder:
        fill(folder, "half")
        (folder.hidden / "layer-0").write_text("x")
    with OutputFolder(tmp_path / "out", restart=True) as folder:
        assert not folder.journal.exists()
        assert not [*folder.result.iterdir(), *folder.hidden.iterdir()]


def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, restart=False) as folder:
        fill(folder, "a")
        for restart in (False, True):
            with pytest.raises(OutputError, match="another process is working on it"):
                OutputFolder(out, restart=restart)
        assert (folder.result / "weights").exists()
    OutputFolder(out, restart=False).close()


def test_a_lock_whose_folder_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first owner publishes between the second one's open and its lock."""
    partial = tmp_path / "out.partial"
    real_open, removed = os.open, False

    def open_then_remove(path: str | Path, *arguments: int, **options: int) -> int:
        nonlocal removed
        fd = real_open(path, *arguments, **options)
        if path == partial / "lock" and not removed:
            removed = True
            shutil.rmtree(partial)
        return fd

    monkeypatch.setattr(folder_module.os, "open", open_then_remove)
    with OutputFolder(tmp_path / "out", restart=False) as folder:
        assert (partial / "lock").exists()
        assert folder.result.exists()
        with pytest.raises(OutputError, match="another process"):
            OutputFolder(tmp_path / "out", restart=False)


def test_a_kill_between_the_two_renames_loses_neither_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    real_rename = Path.rename

    def stop_at_second(self: Path, target: Path) -> Path:
        if Path(target) == out:
            raise KeyboardInterrupt
        return real_rename(self, target)

    with OutputFolder(out, restart=True) as folder:
        fill(folder, "new")
        monkeypatch.setattr(Path, "rename", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            folder.publish()
        monkeypatch.undo()
    with OutputFolder(out, restart=False) as folder:
        folder.publish()
    assert (out / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_kill_after_the_last_rename_leaves_a_finished_output(
    restart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if restart:
        publish(out, "old")
    with OutputFolder(out, restart=restart) as folder:
        fill(folder, "new")
        with monkeypatch.context() as patch:
            patch.setattr(folder_module.shutil, "rmtree", lambda *_, **__: None)
            folder.publish()
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(OutputError, match="exists already"):
        OutputFolder(out, restart=False)
    assert (out / "weights").read_text() == "new"
    publish(out, "newer", restart=True)
    assert (out / "weights").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_out_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, restart=False) as folder:
        fill(folder, "new")
        out.mkdir()
        (out / "theirs").write_text("theirs")
        with pytest.raises(OutputError, match="out: "):
            folder.publish()
    assert [path.name for path in out.iterdir()] == ["theirs"]
    out.rename(tmp_path / "moved")
    with OutputFolder(out, restart=False) as folder:
        folder.publish()
    assert (out / "weights").read_text() == "new"


@pytest.mark.parametrize("name", [".", "", "..", "/"])
def test_a_path_without_a_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="names no new folder"):
        OutputFolder(Path(name), restart=True)


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out\.partial: cannot be created: Not a directory\.") as caught:
        OutputFolder(tmp_path / "file" / "out", restart=False)
    assert "\n" not in str(caught.value)
