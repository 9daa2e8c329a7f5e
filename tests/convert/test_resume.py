"""A job killed at any moment and started again gives the files of an unbroken one, byte for byte.

What a later process meets are files, so a kill matters only between two operations on files, or within one. An unbroken
run lists them all; then processes are killed before, within, and after operations of every kind in every stage.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.convert import hidden as hidden_module
from quantkit.convert.events import Event, Finished, LayerDone, OutputReport, StageStarted, Started, ValidationProgress
from quantkit.convert.folder import OutputFolder
from quantkit.convert.journal import Journal
from quantkit.documents.journal import JobHeader, LayerEntry, OutsideEntry
from quantkit.errors import OutputError
from quantkit.plan.recipe import Recipe
from quantkit.plan.schedule import COMPILING
from quantkit.text.converted import report_text
from tests.convert.jobs import files_of, int4, recipe_of, run, small_config, write_model, write_text

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names files by /proc"),
]
RECIPE = recipe_of(
    int4("role:mtp", grid=2, polish=0),
    int4(grid=2, polish=0),
    others={"second": [int4("role:expert", kind="rtn", grid=2)]},
    tokens=128,
    validated=True,
)
SEED = 20260101


@dataclass(slots=True)
class Operations:
    """Watches every operation on files; ends the process at operation number ``kill_at`` (never if negative).

    ``within``: a write stops half way; else the kill comes before the operation.
    """

    kill_at: int = -1
    within: bool = False
    stage: str = "begin"
    seen: list[str] = field(default_factory=list)

    def on_event(self, event: Event) -> None:
        """Follow the stages."""
        if isinstance(event, StageStarted):
            self.stage = event.stage if event.layer is None else f"layer {event.layer} {event.stage}"
        elif isinstance(event, LayerDone):
            self.stage = f"layer {event.layer} done"
        elif isinstance(event, ValidationProgress):
            self.stage = "validation done"

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Wrap what writes, syncs, renames and removes. Every border between layers is saved."""
        patch.setattr(hidden_module, "SAVING_PAUSE", 0)
        pwrite, append = os.pwrite, Journal._append
        patch.setattr(os, "pwrite", self._writing(pwrite))
        patch.setattr(os, "fsync", self._before("fsync", os.fsync, _file_of))
        for name in ("rename", "replace", "unlink"):
            patch.setattr(Path, name, self._before(name, getattr(Path, name), _kind))
        patch.setattr(shutil, "rmtree", self._before("rmtree", shutil.rmtree, _kind))

        def append_to_journal(journal: Journal, entry: JobHeader | OutsideEntry | LayerEntry) -> None:
            if self._reached("append journal"):
                if self.within:
                    os.write(journal._file.fileno(), b'{"done":"layer","lay')
                os.kill(os.getpid(), signal.SIGKILL)
            append(journal, entry)

        patch.setattr(Journal, "_append", append_to_journal)

    def _writing(self, real: Callable[..., int]) -> Callable[..., int]:
        def pwrite(fd: int, data: Any, offset: int) -> int:
            if self._reached(f"write {_file_of(fd)}"):
                if self.within:
                    real(fd, memoryview(data)[: max(1, len(data) // 2)], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(fd, data, offset)

        return pwrite

    def _before(self, name: str, real: Callable[..., Any], kind: Callable[[Any], str]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if self._reached(f"{name} {kind(arguments[0])}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return operation

    def _reached(self, operation: str) -> bool:
        if self.stage == COMPILING:  # what is learnt of the machine is kept elsewhere, and no part of the job
            return False
        self.seen.append(f"{self.stage}: {operation}")
        return len(self.seen) - 1 == self.kill_at


def _file_of(fd: int) -> str:
    return _kind(Path(f"/proc/self/fd/{fd}").readlink())


def _kind(path: Any) -> str:
    text = str(path)
    safetensors, gguf = (".safetensors.new", ".index.json", ".safetensors"), ("imatrix", ".gguf")
    for part in ("journal", "hidden", *safetensors, *gguf, "replaced"):
        if part in text.rpartition("out")[2]:
            return part.strip(".")
    return "other"


@dataclass(frozen=True, slots=True)
class Job:
    """A source, what an unbroken run makes of it, and the operations on files in which it does so."""

    source: Path
    files: dict[str, bytes]
    operations: tuple[str, ...]

    @property
    def published(self) -> int:
        """The operation that gives the result its name."""
        return max(number for number, operation in enumerate(self.operations) if operation.endswith(": rename other"))

    def run(self, out: Path, watcher: Operations | None = None) -> None:
        """Run, or take up, the job to its end."""
        if watcher is None:
            run(self.source, RECIPE, out)
        else:
            run(self.source, RECIPE, out, on_event=watcher.on_event)

    def killed(self, out: Path, point: int, *, within: bool = False) -> None:
        """Run the job in a process that ends at operation ``point``."""
        child = os.fork()
        if child == 0:
            try:
                watcher = Operations(point, within)
                watcher.watch(pytest.MonkeyPatch())
                self.run(out, watcher)
            finally:
                os._exit(1)  # not reached if the kill came
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"operation {point} was never reached"
        assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("job")
    write_text(place / "calibration.txt")
    write_text(place / "eval.txt", 200)
    write_model(place / "model", small_config(num_hidden_layers=3), fp8=True)
    watcher = Operations()
    with pytest.MonkeyPatch.context() as patch:
        watcher.watch(patch)
        run(place / "model", RECIPE, place / "out", on_event=watcher.on_event)
    return Job(place / "model", files_of(place / "out"), tuple(watcher.seen))


STAGES = {
    "before outside tensors": ("begin", "embeddings"),
    "attention of a dense layer": ("layer 0 attention",),
    "dense mlp": ("layer 0 mlp",),
    "attention of an moe layer": ("layer 1 attention", "layer 2 attention"),
    "shared experts": ("layer 1 shared_experts", "layer 2 shared_experts"),
    "routed experts": ("layer 1 experts", "layer 2 experts"),
    "kept tensors": ("layer 0 kept", "layer 1 kept", "layer 2 kept"),
    "mtp layer": ("layer 3",),
    "files": ("files",),
    "validation and the end": ("validation",),
}


def test_the_stages_cover_the_run(job: Job) -> None:
    prefixes = tuple(prefix for stage in STAGES.values() for prefix in stage)
    assert [operation for operation in job.operations if not operation.startswith(prefixes)] == []
    for prefix in prefixes:
        assert any(operation.startswith(prefix) for operation in job.operations), (prefix, sorted(set(job.operations)))
    kinds = {operation.partition(": ")[2] for operation in job.operations}
    assert {"append journal", "write hidden", "replace hidden", "unlink hidden", "write safetensors"} <= kinds


@pytest.mark.parametrize("stage", STAGES)
def test_killed_once_at_each_kind_of_operation(stage: str, job: Job, tmp_path: Path) -> None:
    """One operation of each kind in the stage, drawn by a fixed seed; writes are torn."""
    draw = random.Random(f"{SEED} {stage}")
    points: dict[str, list[int]] = {}
    for number, operation in enumerate(job.operations):
        if operation.startswith(STAGES[stage]):
            points.setdefault(operation, []).append(number)
    for operation, numbers in points.items():
        out = tmp_path / "out"
        point = draw.choice(numbers)
        job.killed(out, point, within=True)
        assert out.exists() == (point > job.published)
        finish(job, out, operation)
        shutil.rmtree(out)


def finish(job: Job, out: Path, where: str) -> None:
    """Start the same job again. Killed after its result got its name, it is complete, and OUT.partial goes."""
    if not out.exists() or out.with_name("out.partial").exists():
        job.run(out)
    assert not out.with_name("out.partial").exists()
    found = files_of(out)
    different = [name for name in found.keys() | job.files.keys() if found.get(name) != job.files.get(name)]
    assert not different, where


def test_layers_behind_the_last_saved_border_are_done_again(job: Job, tmp_path: Path) -> None:
    """Saving takes time, so not every border is saved."""
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        try:
            pytest.MonkeyPatch().setattr(hidden_module, "SAVING_PAUSE", 1e9)  # only the first one is
            run(job.source, RECIPE, out, on_event=kill_in_last_experts)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    saved = {path.name for path in out.with_name("out.partial").glob("hidden/layer-*")}
    n_slices = min(8, RECIPE.calibration.tokens // RECIPE.calibration.sequence_length)
    assert saved == {f"layer-0-stream-{stream}-slice-{part}.f32" for stream in (0, 1) for part in range(n_slices)}
    begun: list[Started] = []
    run(job.source, RECIPE, out, on_event=lambda event: begun.append(event) if isinstance(event, Started) else None)
    assert [event.layers_done for event in begun] == [1]
    assert files_of(out) == job.files


def kill_in_last_experts(event: Event) -> None:
    if isinstance(event, StageStarted) and (event.layer, event.stage) == (2, "experts"):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("turn", range(4))
def test_killed_again_and_again_at_random(turn: int, job: Job, tmp_path: Path) -> None:
    """Each process gets a random number of operations further than resuming takes, and the last one finishes."""
    draw = random.Random(SEED + turn)
    out = tmp_path / "out"
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                watcher = Operations(draw.randrange(5, len(job.operations) // 2), within=draw.random() < 0.5)
                watcher.watch(pytest.MonkeyPatch())
                job.run(out, watcher)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        draw.random()
        if out.exists():
            break
    finish(job, out, f"turn {turn}")


def test_a_restarted_job_that_was_killed_goes_on_and_replaces(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, content in job.files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (out / "main" / "config.json").write_bytes(b"old")
    child = os.fork()
    if child == 0:
        try:
            watcher = Operations(len(job.operations) * 2 // 3)
            watcher.watch(pytest.MonkeyPatch())
            run(job.source, RECIPE, out, restart=True, on_event=watcher.on_event)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert files_of(out) == {**job.files, "main/config.json": b"old"}
    job.run(out)
    assert files_of(out) == job.files


def without_paths(output: OutputReport) -> OutputReport:
    return replace(output, path=Path(), serve=tuple(command.split()[0] for command in output.serve))


@pytest.mark.parametrize("restart", [False, True])
def test_killed_while_the_work_folder_is_removed_it_is_finished_already(
    restart: bool, job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if restart:
        job.run(out)
    child = os.fork()
    if child == 0:
        try:
            pytest.MonkeyPatch().setattr(OutputFolder, "discard", lambda _: os.kill(os.getpid(), signal.SIGKILL))
            run(job.source, RECIPE, out, restart=restart)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    other = RECIPE.model_copy(update={"validation": None})
    with pytest.raises(OutputError, match=r"out: exists already\. .*--restart"):
        run(job.source, other, out)
    told: list[Event] = []
    report = run(job.source, RECIPE, out, on_event=told.append)
    assert told == [Finished(report)]
    assert report.finished_before
    assert report_text(report).startswith("finished already")
    assert files_of(out) == job.files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = run(job.source, RECIPE, tmp_path / "whole")
    assert (*map(without_paths, report.outputs),) == (*map(without_paths, whole.outputs),)
    assert (report.validated, report.tokens) == (whole.validated, whole.tokens)
    assert report.expert_tokens == whole.expert_tokens


# --------------------------------------------------------------------------------------------------- the command


def command(job: Job, recipe: Path, out: Path) -> subprocess.Popen[str]:
    script = "import sys; from quantkit.cli.app import main; sys.argv[0] = 'quantkit'; main()"
    arguments = [
        "convert",
        str(job.source),
        "-r",
        str(recipe),
        "-o",
        str(out),
        "--jobs",
        "1",
        "--memory-budget",
        "2GiB",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def write_recipe(path: Path, recipe: Recipe) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False))
    return path


def test_the_command_killed_and_interrupted_goes_on(job: Job, tmp_path: Path) -> None:
    recipe = write_recipe(job.source.parent / "recipe.yaml", RECIPE)
    out = tmp_path / "out"
    first = command(job, recipe, out)
    wait_for(out.with_name("out.partial") / "journal.jsonl", lines=3)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    lines = (out.with_name("out.partial") / "journal.jsonl").read_bytes().count(b"\n")
    second = command(job, recipe, out)
    wait_for(out.with_name("out.partial") / "journal.jsonl", lines=min(lines + 1, 4))
    second.terminate()
    _, errors = second.communicate(timeout=600)
    if second.returncode != 0:  # 0: it was faster than the signal
        assert second.returncode == 130, errors
        assert f"Resume with: quantkit convert {job.source}" in errors
        third = command(job, recipe, out)
        _, errors = third.communicate(timeout=600)
        assert third.returncode == 0, errors
    assert files_of(out) == job.files


def wait_for(path: Path, lines: int) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        if path.parent.with_suffix("").exists():
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} never had {lines} lines")
