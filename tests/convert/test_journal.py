"""The journal: what it says is on the disk, a torn line is nothing, another job is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.convert import journal as journal_module
from quantkit.convert.journal import Journal
from quantkit.errors import OutputError

HEADER = {"quantkit version": "1", "recipe": "abc", "threads": 2}
ENTRIES: list[dict[str, object]] = [
    {"done": "outside"},
    {"done": "layer", "layer": 0, "tensors": [[0, "näme", 0.1, 3, ""]], "experts": {}},
    {"done": "layer", "layer": 1, "tensors": [[0, "b", 1e-17, 3, "x"]], "experts": {"e": [[1, 0.3, 0]]}},
]


def written(path: Path, entries: list[dict[str, object]] = ENTRIES) -> bytes:
    journal = Journal(path, HEADER)
    for entry in entries:
        journal.append(entry)
    journal.close()
    return path.read_bytes()


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    content = written(tmp_path / "j")
    journal = Journal(tmp_path / "j", HEADER)
    assert journal.entries == ENTRIES
    assert journal.of_kind("layer") == ENTRIES[1:]
    journal.close()
    assert (tmp_path / "j").read_bytes() == content


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_journal_cut_or_torn_anywhere_keeps_its_whole_lines(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes after the cut may be anything: blocks that a crash left unwritten are zeros, or old content."""
    path = tmp_path_factory.mktemp("journal") / "j"
    content = written(path)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut] + data.draw(st.sampled_from([b"", b"\0" * 9, b'{"done":"layer"', b"\xff\n{}\n"])))
    whole = content[:cut].count(b"\n")
    journal = Journal(path, HEADER)
    assert journal.entries == ENTRIES[: max(whole - 1, 0)]
    for entry in ENTRIES[len(journal.entries) :]:
        journal.append(entry)
    journal.close()
    assert path.read_bytes() == content


def test_another_job_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    content = written(tmp_path / "j")
    with pytest.raises(OutputError, match=r"another recipe, threads \(\d+, now 1\)\. .*--restart"):
        Journal(tmp_path / "j", {**HEADER, "recipe": "other", "threads": 1})
    with pytest.raises(OutputError, match="another source"):
        Journal(tmp_path / "j", {**HEADER, "source": "new key"})
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_the_step_is_done_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    written(path, ENTRIES[:1])
    journal = Journal(path, HEADER)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(journal_module.os, "fsync", full)
        else:
            journal._file.close()
            journal._file = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115
        with pytest.raises(OutputError, match=r"the disk is full\. Free space"):
            journal.append(ENTRIES[1])
        journal.close()
    assert journal.entries == ENTRIES[:1]
    again = Journal(path, HEADER)
    assert again.entries in (ENTRIES[:1], ENTRIES[:2])  # a line whose fsync failed may be there
    again.close()
