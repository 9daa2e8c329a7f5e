"""Whatever call that writes fails, or is the last one of a process: one line at most, never a torn OUT, and the same
command gives the bytes of an unbroken run. A sample by a fixed seed; `benchmarks/faults.py` tries all."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.injected import FAULTS, FaultyJob
from tests.faults.small_job import small_job

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names files by /proc"),
]
SEED = 20261130


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FaultyJob:
    return small_job(tmp_path_factory.mktemp("job"))


def kind(call: str) -> str:
    """ "pwrite model.gguf" for all writes into it."""
    name, _, path = call.partition(" ")
    return f"{name} {Path(path).name}"


def test_the_sweep_sees_the_calls_of_every_part(job: FaultyJob) -> None:
    kinds = {kind(call) for call in job.calls}
    assert {call.split()[0] for call in job.calls} >= {"pwrite", "fsync", "rename", "replace", "mkdir", "unlink"}
    for wanted in ("fsync journal.jsonl", "pwrite imatrix.gguf", "rename result", "replace quantkit.json.new"):
        assert wanted in kinds, sorted(kinds)
    assert any(call.startswith("pwrite") and "layer-0-stream" in call for call in job.calls)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails_costs_no_bytes(fault: str, job: FaultyJob, tmp_path: Path) -> None:
    """Of ten kinds of calls one each."""
    draw = random.Random(f"{SEED} {fault}")
    kinds: dict[str, list[int]] = {}
    for number, call in enumerate(job.calls):
        if fault != "short write" or call.startswith("pwrite"):
            kinds.setdefault(kind(call), []).append(number)
    for chosen in draw.sample(sorted(kinds), min(10, len(kinds))):
        at = draw.choice(kinds[chosen])
        assert not job.problem(tmp_path / "out", at, fault), f"{fault} at {at}, {job.calls[at]}"
        shutil.rmtree(tmp_path / "out")
