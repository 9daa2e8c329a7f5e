"""OUT.partial after a kill: no result is lost, and nothing is replaced without leave."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from quantkit.convert import folder as folder_module
from quantkit.convert.folder import OutputFolder
from quantkit.errors import OutputError
from tests.convert.test_folder import fill, publish, taken


def test_a_kill_between_the_two_renames_loses_neither_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    real_rename = Path.rename

    def stop_at_second(self: Path, target: Path) -> Path:
        if Path(target) == out:
            raise KeyboardInterrupt
        return real_rename(self, target)

    with taken(out, restart=True) as folder:
        fill(folder, "new")
        monkeypatch.setattr(Path, "rename", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            folder.publish()
        monkeypatch.undo()
    with taken(out, restart=False) as folder:
        folder.publish()
    assert (out / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("restart", [False, True])
def test_a_kill_while_the_work_folder_is_removed_leaves_no_leave_to_replace(
    restart: bool, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same job is found finished, and another one must say --restart."""
    out, real, removed = tmp_path / "out", folder_module._remove, []
    if restart:
        publish(out, "old")

    def stop(path: Path) -> None:
        if (out / "weights").read_text() == "new":
            removed.append(path)
            if len(removed) > at:
                raise KeyboardInterrupt
        real(path)

    with taken(out, restart=restart) as folder:
        fill(folder, "new")
        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "_remove", stop)
            patch.setattr(folder_module.shutil, "rmtree", lambda *_, **__: None)
            with suppress(KeyboardInterrupt):
                folder.publish()
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(OutputError, match="exists already"):
        OutputFolder(out, ["another"], restart=False)
    with taken(out, restart=False) as folder:
        assert folder.finished
        folder.discard()
    assert (out / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    publish(out, "newer", restart=True)
    assert (out / "weights").read_text() == "newer"


@pytest.mark.parametrize("gone", ["journal.jsonl", "result"])
def test_the_mark_alone_is_no_leave_to_replace(gone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    with taken(out, restart=True) as folder:
        fill(folder, "new")
    left = tmp_path / "out.partial" / gone
    shutil.rmtree(left) if left.is_dir() else left.unlink()
    (out / "weights").unlink()  # nor is this a finished result
    with pytest.raises(OutputError, match="exists already"):
        taken(out, restart=False)


def test_a_restart_after_a_kill_between_the_two_renames_keeps_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    with taken(out, restart=True) as folder:
        fill(folder, "new")
    out.rename(tmp_path / "out.partial" / "replaced")
    with taken(out, restart=True):
        assert (out / "weights").read_text() == "old"
