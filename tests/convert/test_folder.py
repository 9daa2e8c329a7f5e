"""OUT.partial: one living owner, nothing overwritten without leave, one rename at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from quantkit.convert import folder as folder_module
from quantkit.convert.folder import OutputFolder, refuse_taken
from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.journal import JobHeader
from quantkit.errors import OutputError

NAMES = ("main",)


def taken(out: Path, *, restart: bool) -> OutputFolder:
    return OutputFolder(out, NAMES, restart=restart)


def write_result(folder: Path, text: str, output: str = "main", outputs: Sequence[str] = NAMES, job: str = "a") -> None:
    """What a conversion leaves: weights, a model card, and quantkit.json of a job with these outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(text)
    (folder / "README.md").write_text("# model\n")
    document = ConversionDocument(
        quantkit="1",
        job=JobHeader(recipe=job),
        recipe={"outputs": [{"name": name} for name in outputs]},
        output=output,
        tensor_bytes=1,
        bpw=4.0,
        tensors={},
        sha256={"weights": "0" * 64},
    )
    (folder / "quantkit.json").write_text(document.to_json())


def fill(folder: OutputFolder, text: str) -> None:
    folder.journal.write_text("{}\n")
    write_result(folder.result, text)


def publish(out: Path, text: str, *, restart: bool = False) -> None:
    with taken(out, restart=restart) as folder:
        fill(folder, text)
        folder.publish()


def test_publish_gives_the_result_its_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path / "new" / "out", "a")
    assert (tmp_path / "new" / "out" / "weights").read_text() == "a"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "empty folder"])
def test_an_existing_out_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        publish(out, "old")
    elif kind == "empty folder":
        out.mkdir()
    else:
        out.write_text("old")
    with pytest.raises(
        OutputError,
        match=r"out: exists already(\. .*--restart|, and is no folder that quantkit made\. .*remove it yourself)",
    ):
        taken(out, restart=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if kind == "folder":
        assert (out / "weights").read_text() == "old"


@pytest.mark.parametrize("kind", ["folder", "empty folder"])
def test_restart_replaces_only_at_the_end(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.old").mkdir()  # somebody else's
    if kind == "folder":
        publish(out, "old")
    else:
        out.mkdir()
    with taken(out, restart=True) as folder:
        fill(folder, "new")
        assert os.path.lexists(out)
        assert not (out / "weights").exists() or (out / "weights").read_text() == "old"
        folder.publish()
    assert (out / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"]


def lay_out(out: Path, kind: str) -> None:
    """Something at OUT that a restart of a job with the output "main" must not delete."""
    several = ("main", "other")
    if kind == "a file":
        out.write_text("years of work")
    elif kind == "a folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    elif kind == "own files in a result":
        write_result(out, "old")
        (out / "thesis.txt").write_text("years of work")
    elif kind == "a folder in a result":
        write_result(out, "old")
        (out / "weights").rename(out / "w")
        (out / "weights").mkdir()
        (out / "weights" / "thesis.txt").write_text("years of work")
    elif kind == "a result of another output":
        write_result(out, "old", "other", ("other",))
    elif kind == "two separate results":
        write_result(out / "A", "old")
        write_result(out / "B", "old", job="b")
    elif kind == "a separate result of this name":
        write_result(out / "main", "old")
    elif kind == "results of two jobs":
        write_result(out / "main", "old", "main", several)
        write_result(out / "other", "old", "other", several, job="b")
    elif kind == "own files beside several results":
        write_result(out / "main", "old", "main", several)
        (out / "thesis.txt").write_text("years of work")
    elif kind == "own files in one of several results":
        write_result(out / "main", "old", "main", several)
        (out / "main" / "thesis.txt").write_text("years of work")
    else:
        write_result(out / "main", "old", "main", several)
        (out / "other").symlink_to("main")


FOREIGN = {
    "a file": "is no folder that quantkit made",
    "a folder": "is no folder that quantkit made: it holds thesis.txt",
    "own files in a result": "holds thesis.txt, which quantkit did not make",
    "a folder in a result": "holds w, which quantkit did not make",
    "a result of another output": "holds the output other, not this job's main",
    "two separate results": "holds A, a result of another job",
    "a separate result of this name": "holds main, a result of another job",
    "results of two jobs": "holds other, a result of another job",
    "own files beside several results": "is no folder that quantkit made: it holds thesis.txt",
    "own files in one of several results": "holds thesis.txt, which quantkit did not make",
    "a link beside several results": "is no folder that quantkit made: it holds other",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_restart_deletes_nothing_that_this_job_did_not_make(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lay_out(out, kind)
    before = tree(tmp_path)
    outputs = ("main", "other") if "two jobs" in kind or "several" in kind or "separate" in kind else NAMES
    with pytest.raises(OutputError, match=f"out: {FOREIGN[kind]}, and --restart would delete it") as refused:
        OutputFolder(out, outputs, restart=True)
    assert "\n" not in str(refused.value)
    assert tree(tmp_path) == before


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")
    }  # fmt: skip


def test_own_files_that_came_while_the_job_ran_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    with taken(out, restart=True) as folder:
        fill(folder, "new")
        (out / "thesis.txt").write_text("years of work")
        with pytest.raises(OutputError, match="holds thesis.txt, which quantkit did not make"):
            folder.publish()
    with pytest.raises(OutputError, match="holds thesis.txt, which quantkit did not make"):
        taken(out, restart=False)
    (out / "thesis.txt").rename(tmp_path / "thesis.txt")
    with taken(out, restart=False) as folder:
        folder.publish()
    assert (out / "weights").read_text() == "new"


def test_restart_replaces_a_result_of_several_outputs(tmp_path: Path) -> None:
    out, names = tmp_path / "out", ("int4", "q4")
    for name in names:
        write_result(out / name, "old", name, names)
    with OutputFolder(out, names, restart=True) as folder:
        for name in names:
            write_result(folder.result / name, "new", name, names)
        folder.publish()
    assert (out / "q4" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("link", ["out", "out.partial", "out.partial/result"])
def test_a_link_is_refused_whatever_it_leads_to(link: str, restart: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"is a link to .*elsewhere, a folder was needed\. Give the folder itself"):
        taken(tmp_path / "out", restart=restart)
    assert (tmp_path / link).is_symlink()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_partial_folder_on_another_file_system_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, real = tmp_path / "out.partial", Path.stat
    partial.mkdir()

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = real(path, **options)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:])) if path == partial else found

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(OutputError, match=r"out\.partial: is on another file system than"):
        refuse_taken(tmp_path / "out", NAMES, restart=False)


def test_a_partial_folder_that_is_somebody_else_s_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"out\.partial: holds thesis.txt, which quantkit did not make"):
            taken(tmp_path / "out", restart=restart)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_a_restart_that_was_stopped_goes_on_without_restart_and_still_replaces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    with taken(out, restart=True) as folder:
        fill(folder, "new")
    with taken(out, restart=False) as folder:
        assert (folder.result / "weights").read_text() == "new"
        folder.publish()
    assert (out / "weights").read_text() == "new"


def test_restart_discards_an_unfinished_job(tmp_path: Path) -> None:
    with taken(tmp_path / "out", restart=False) as folder:
        fill(folder, "half")
        (folder.hidden / "layer-0").write_text("x")
    with taken(tmp_path / "out", restart=True) as folder:
        assert not folder.journal.exists()
        assert not [*folder.result.iterdir(), *folder.hidden.iterdir()]


def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with taken(out, restart=False) as folder:
        fill(folder, "a")
        for restart in (False, True):
            with pytest.raises(OutputError, match="another process is working on it"):
                taken(out, restart=restart)
        assert (folder.result / "weights").exists()
    taken(out, restart=False).close()


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
    with taken(tmp_path / "out", restart=False) as folder:
        assert (partial / "lock").exists()
        assert folder.result.exists()
        with pytest.raises(OutputError, match="another process"):
            taken(tmp_path / "out", restart=False)


def test_an_out_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with taken(out, restart=False) as folder:
        fill(folder, "new")
        out.mkdir()
        (out / "theirs").write_text("theirs")
        with pytest.raises(OutputError, match="out: "):
            folder.publish()
    assert [path.name for path in out.iterdir()] == ["theirs"]
    out.rename(tmp_path / "moved")
    with taken(out, restart=False) as folder:
        folder.publish()
    assert (out / "weights").read_text() == "new"


def test_a_folder_that_cannot_be_laid_out_is_unlocked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "sync_directory", full)
        with pytest.raises(OutputError, match="the disk is full"):
            taken(tmp_path / "out", restart=False)
    taken(tmp_path / "out", restart=False).close()


@pytest.mark.parametrize("name", [".", "", "..", "/"])
def test_a_path_without_a_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="names no new folder"):
        taken(Path(name), restart=True)


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out\.partial: cannot be created: Not a directory\.") as caught:
        taken(tmp_path / "file" / "out", restart=False)
    assert "\n" not in str(caught.value)
