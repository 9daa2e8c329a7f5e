"""A conversion to GGUF that was killed at any moment and started again gives the same model and the same imatrix."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantkit.convert.events import ignore
from tests.convert.gguf_jobs import RTN, gguf_output, gguf_recipe
from tests.convert.jobs import files_of, run, small_config, write_model, write_text
from tests.convert.test_resume import Job, Operations

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = gguf_output(
    {"match": "role:attention", "scheme": "Q4_0", "method": {"kind": "gptq", "polish": 0}},
    name="main",
    preset="Q5_1",
    method=RTN,
    mtp="keep",
)
RESUMED = gguf_recipe(SMALL, tokens=128, least=16)


@dataclass(frozen=True, slots=True)
class GgufJob(Job):
    """The machinery of test_resume.py on a GGUF output with its imatrix."""

    def run(self, out: Path, watcher: Operations | None = None) -> None:
        run(self.source, RESUMED, out, on_event=ignore if watcher is None else watcher.on_event)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> GgufJob:
    place = tmp_path_factory.mktemp("resume")
    write_text(place / "calibration.txt")
    write_model(place / "model", small_config(), fp8=True)
    watcher = Operations()
    with pytest.MonkeyPatch.context() as patch:
        watcher.watch(patch)
        run(place / "model", RESUMED, place / "out", on_event=watcher.on_event)
    assert {"model-main.gguf", "imatrix.gguf", "quantkit.json"} <= set(files_of(place / "out"))
    return GgufJob(place / "model", files_of(place / "out"), tuple(watcher.seen))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # one thread: nothing to lock
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names files by /proc")
@pytest.mark.parametrize(
    "operation",
    [
        "begin: rename gguf",
        "begin: rename imatrix",
        "embeddings: write gguf",
        "layer 0 attention: write imatrix",
        "layer 1 attention: write gguf",
        "layer 1 experts: write gguf",
        "layer 1 experts: write imatrix",
        "layer 1 kept: append journal",
        "layer 2 experts: write gguf",
        "files: replace other",
    ],
)
def test_a_job_that_was_killed_gives_the_same_bytes(operation: str, job: GgufJob, tmp_path: Path) -> None:
    """Killed in the middle of an operation of this kind, drawn by a fixed seed, and started again."""
    points = [number for number, seen in enumerate(job.operations) if seen == operation]
    assert points, sorted(set(job.operations))
    job.killed(tmp_path / "out", random.Random(operation).choice(points), within=True)
    assert not (tmp_path / "out").exists()
    job.run(tmp_path / "out")
    found = files_of(tmp_path / "out")
    assert [name for name in found.keys() | job.files.keys() if found.get(name) != job.files.get(name)] == []
