"""What the end of a conversion does not believe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.convert.events import Event, StageStarted
from quantkit.documents.journal import ENTRY
from quantkit.errors import OutputError
from tests.convert.jobs import int4, recipe_of, run, write_model, write_text


class Stopped(Exception):
    """The job ends here."""


def stop_before_files(event: Event) -> None:
    if isinstance(event, StageStarted) and event.stage == "files":
        raise Stopped


@pytest.mark.parametrize("name", ["missing", "unknown"])
def test_a_journal_that_does_not_fit_the_plan_is_refused(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_text(tmp_path / "calibration.txt")
    recipe, out = recipe_of(int4(kind="rtn"), tokens=None), tmp_path / "out"
    with pytest.raises(Stopped):
        run(tmp_path / "model", recipe, out, on_event=stop_before_files)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    *lines, line, mtp = journal.read_bytes().splitlines(keepends=True)
    entry = ENTRY.validate_json(line)
    first, *others = entry.tensors
    tensors = (*others, replace(first, name="a.weight")) if name == "unknown" else tuple(others)
    edited = entry.model_copy(update={"tensors": tensors}).model_dump_json().encode() + b"\n"
    journal.write_bytes(b"".join([*lines, edited, mtp]))
    with pytest.raises(OutputError, match=r"journal\.jsonl: does not fit this job: .* --restart"):
        run(tmp_path / "model", recipe, out)
