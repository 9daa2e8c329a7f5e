"""What the end of a conversion does not believe."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantkit.convert.events import Event, StageStarted
from quantkit.convert.journal import Journal, checked_line
from quantkit.documents.journal import ENTRY
from quantkit.errors import OutputError
from tests.convert.gguf_jobs import RTN, gguf_output, gguf_recipe
from tests.convert.jobs import int4, recipe_of, run, write_model, write_text

SMALL_GGUF = gguf_output(name="main", preset="Q5_1", method=RTN, mtp="keep")


class Stopped(Exception):
    """The job ends here."""


def stop_before_files(event: Event) -> None:
    if isinstance(event, StageStarted) and event.stage == "files":
        raise Stopped


@pytest.mark.parametrize("step", ["layer 0", "layer 1", "layer 2", "what lies outside the layers"])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_byte_that_changed_after_its_layer_was_written_is_missed(form: str, step: str, tmp_path: Path) -> None:
    """One bit of bytes that the journal vouches for, between a stop and the resumed run."""
    write_model(tmp_path / "model")
    write_text(tmp_path / "calibration.txt")
    folder = recipe_of(int4(kind="rtn"), tokens=None)
    recipe, out = folder if form == "folder" else gguf_recipe(SMALL_GGUF, tokens=64, least=4), tmp_path / "out"
    with pytest.raises(Stopped):
        run(tmp_path / "model", recipe, out, on_event=stop_before_files)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "kept")
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_bytes().splitlines()[1:]
    ranges = Journal.steps_of(SimpleNamespace(entries=[ENTRY.validate_json(line) for line in lines]), 0)[step]
    files = sorted(
        (tmp_path / "out.partial" / "result").iterdir(), key=lambda path: ("imatrix" in path.name, path.name)
    )
    assert {item.file for item in ranges} <= set(range(len(files)))
    draw = random.Random(step)
    for item in draw.sample(ranges, min(3, len(ranges))):
        flip_bit(files[item.file], item.start + draw.randrange(item.nbytes), draw.randrange(8))
        with pytest.raises(OutputError, match=rf"{files[item.file].name}: {step} is not as it was written.*--restart"):
            run(tmp_path / "model", recipe, out)
        assert not out.exists()
        shutil.rmtree(tmp_path / "out.partial")
        shutil.copytree(tmp_path / "kept", tmp_path / "out.partial")
    run(tmp_path / "model", recipe, out)
    assert (out / "quantkit.json").exists()


def flip_bit(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ 1 << bit]))


@pytest.mark.parametrize("name", ["missing", "unknown"])
def test_a_journal_that_does_not_fit_the_plan_is_refused(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_text(tmp_path / "calibration.txt")
    recipe, out = recipe_of(int4(kind="rtn"), tokens=None), tmp_path / "out"
    with pytest.raises(Stopped):
        run(tmp_path / "model", recipe, out, on_event=stop_before_files)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    header, *lines = journal.read_bytes().splitlines()
    *entries, entry, mtp = map(ENTRY.validate_json, lines)
    first, *others = entry.tensors
    tensors = (*others, replace(first, name="a.weight")) if name == "unknown" else tuple(others)
    content, end = checked_line(header, None)
    for edited in (*entries, entry.model_copy(update={"tensors": tensors}), mtp):
        line, end = checked_line(edited.model_dump_json().encode(), end)
        content += line
    journal.write_bytes(content)
    with pytest.raises(OutputError, match=r"journal\.jsonl: does not fit this job: .* --restart"):
        run(tmp_path / "model", recipe, out)
