"""The journal: what it says is on the disk, a torn line is nothing, another job is named."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.convert import journal as journal_module
from quantkit.convert.journal import End, Journal, checked_line
from quantkit.documents.journal import ExpertRecord, FileState, JournalHeader, LayerEntry, OutsideEntry, TensorRecord
from quantkit.errors import OutputError
from quantkit.plan.memory import JOURNAL_BYTES_PER_TENSOR

SOURCE = Path("checkpoint")
HEADER = JournalHeader(quantkit_version="1", recipe="abc", threads=2)
ENTRIES: list[OutsideEntry | LayerEntry] = [
    OutsideEntry(tensors=(TensorRecord(1, "head", 0.25, 0),)),
    LayerEntry(layer=0, saved=True, tensors=(TensorRecord(0, "näme", 0.1, 3),), experts={}),
    LayerEntry(
        layer=1,
        saved=False,
        tensors=(TensorRecord(0, "b", 1e-17, 3, "x"), TensorRecord(1, "b", 2.0, 3)),
        experts={"e": (ExpertRecord(1, 0.3, 0), ExpertRecord(0, 0.0, 128))},
    ),
]


def written(path: Path, entries: list[OutsideEntry | LayerEntry] = ENTRIES) -> bytes:
    journal = Journal(path, HEADER, SOURCE)
    for entry in entries:
        journal.append(entry)
    journal.close()
    return path.read_bytes()


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    content = written(tmp_path / "j")
    journal = Journal(tmp_path / "j", HEADER, SOURCE)
    assert journal.entries == ENTRIES
    assert journal.layers == ENTRIES[1:]
    assert journal.outside_done
    assert list(journal.tensors_of(1).values()) == [TensorRecord(1, "head", 0.25, 0), TensorRecord(1, "b", 2.0, 3)]
    journal.close()
    assert (tmp_path / "j").read_bytes() == content


def test_lines_are_json_with_a_name_for_each_value(tmp_path: Path) -> None:
    header, _, _, last = map(json.loads, written(tmp_path / "j").splitlines())
    assert header["quantkit version"] == "1"
    assert header["memory budget"] is None
    assert last["done"] == "layer"
    record = {"output": 0, "name": "b", "relative_loss": 1e-17, "n_tokens": 3, "fallback": "x", "output_loss": None}
    assert last["tensors"][0] == record
    assert last["experts"] == {"e": [[1, 0.3, 0], [0, 0.0, 128]]}


def test_a_line_ends_in_the_crc32_of_all_that_was_said_up_to_it(tmp_path: Path) -> None:
    said = b""
    for number, line in enumerate(written(tmp_path / "j").splitlines()):
        text, _, checksum = line.partition(b',"crc32":')
        said += text + b"}" if checksum else text
        assert checksum == (b"%d}" % zlib.crc32(said) if number else b"")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_edited_loss_is_not_believed(at: int, tmp_path: Path) -> None:
    """Whoever edits a line does not know its checksum: its step and those after it are done again."""
    path = tmp_path / "j"
    lines = written(path).splitlines(keepends=True)
    edited = re.sub(rb'"relative_loss":[^,]*', b'"relative_loss":0.001', lines[at], count=1)
    assert edited != lines[at]
    path.write_bytes(b"".join([*lines[:at], edited, *lines[at + 1 :]]))
    journal = Journal(path, HEADER, SOURCE)
    journal.close()
    assert journal.entries == ENTRIES[: at - 1]
    assert path.read_bytes() == b"".join(lines[:at])


@pytest.mark.parametrize("order", [(0, 2, 3), (0, 1, 3), (0, 2, 1, 3), (0, 1, 2, 2, 3)])
def test_a_line_that_is_lost_moved_or_twice_ends_the_journal(order: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "j"
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[at] for at in order))
    journal = Journal(path, HEADER, SOURCE)
    journal.close()
    right = next(place for place, at in enumerate(order) if place != at)
    assert journal.entries == ENTRIES[: right - 1]


def test_lines_without_checksums_are_no_entries(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(re.sub(rb',"crc32":\d+', b"", written(path)))
    journal = Journal(path, HEADER, SOURCE)
    journal.close()
    assert journal.entries == []


def test_lines_under_another_first_one_are_done_again(tmp_path: Path) -> None:
    """What a header may differ in, such as the memory budget, is in the checksums too."""
    path = tmp_path / "j"
    path.write_bytes(written(path).replace(b'"memory budget":null', b'"memory budget":1024', 1))
    journal = Journal(path, HEADER, SOURCE)
    journal.close()
    assert journal.entries == []


def test_a_loss_that_is_no_number_comes_back_as_none(tmp_path: Path) -> None:
    (lost,) = [LayerEntry(layer=0, saved=False, tensors=(TensorRecord(0, "a", math.nan, 1),), experts={})]
    written(tmp_path / "j", [lost])
    journal = Journal(tmp_path / "j", HEADER, SOURCE)
    journal.close()
    assert math.isnan(journal.tensors_of(0)["a"].relative_loss)


def test_a_layer_of_deepseek_v3_takes_no_more_than_the_plan_says(tmp_path: Path) -> None:
    names = [
        f"model.layers.60.mlp.experts.{e}.{part}_proj.weight" for e in range(256) for part in ("gate", "up", "down")
    ]
    tensors = tuple(TensorRecord(0, name, 0.00012345678901234567, 65536) for name in names)
    experts = (ExpertRecord(65536, 12345.67890123456, 0),) * 256
    layer = LayerEntry(layer=60, saved=True, tensors=tensors, experts={"experts": experts})
    assert len(written(tmp_path / "j", [layer])) < JOURNAL_BYTES_PER_TENSOR * len(names)


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
    journal = Journal(path, HEADER, SOURCE)
    assert journal.entries == ENTRIES[: max(whole - 1, 0)]
    for entry in ENTRIES[len(journal.entries) :]:
        journal.append(entry)
    journal.close()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        "null",
        '{"done":"layer"}',
        '{"done":"other"}',
        '{"done":"outside","tensors":[[0,"a",0.1,3,""]]}',
        '{"done":"outside","tensors":[{"output":-1,"name":"a","relative_loss":0.1,"n_tokens":3,"fallback":""}]}',
        '{"done":"outside","tensors":[], "spaces": 1}',
        '{"done":"layer","layer":7,"saved":"yes","tensors":[],"experts":{}}',
        "[" * 100_000,
        "1" * 10_000,
    ],
)
@pytest.mark.parametrize("summed", [False, True])
def test_a_line_that_is_no_entry_ends_the_journal(line: str, summed: bool, tmp_path: Path) -> None:
    """Its step, and those of the lines after it, are done again."""
    path = tmp_path / "j"
    first, *lines = written(path).splitlines(keepends=True)
    content = line.encode() + b"\n"
    if summed:
        before = End(0, zlib.crc32(lines[0].partition(b',"crc32":')[0] + b"}", zlib.crc32(first[:-1])))
        content, _ = checked_line(line.encode(), before)
    path.write_bytes(b"".join([first, lines[0], content, *lines[1:]]))
    journal = Journal(path, HEADER, SOURCE)
    journal.close()
    assert journal.entries == ENTRIES[:1]
    assert path.read_bytes() == first + lines[0]


def test_the_last_entries_are_taken_back(tmp_path: Path) -> None:
    content = written(tmp_path / "j")
    journal = Journal(tmp_path / "j", HEADER, SOURCE)
    journal.rewind(1)
    assert journal.entries == ENTRIES[:1]
    for entry in ENTRIES[1:]:
        journal.append(entry)
    journal.close()
    assert (tmp_path / "j").read_bytes() == content


def test_another_job_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    content = written(tmp_path / "j")
    with pytest.raises(OutputError, match=r"differs from this one: recipe; threads \(2 then, 1 now\)\. .*--restart"):
        Journal(tmp_path / "j", HEADER.model_copy(update={"recipe": "other", "threads": 1}), SOURCE)
    with pytest.raises(OutputError, match=r"differs from this one: source\."):
        Journal(tmp_path / "j", JournalHeader(quantkit_version="1", recipe="abc", threads=2, source="new key"), SOURCE)
    assert (tmp_path / "j").read_bytes() == content


def test_a_shard_that_changed_is_named(tmp_path: Path) -> None:
    files = {f"model-{number}.safetensors": FileState(100, 5, 6, number) for number in range(3)}
    header = HEADER.model_copy(update={"source_files": files})
    Journal(tmp_path / "j", header, SOURCE).close()
    Journal(tmp_path / "j", header, SOURCE).close()
    one, two = "model-1.safetensors", "model-2.safetensors"
    for state in (FileState(101, 5, 6, 1), FileState(100, 6, 6, 1), FileState(100, 5, 7, 1), FileState(100, 5, 6, 9)):
        changed = HEADER.model_copy(update={"source_files": {**files, one: state}})
        with pytest.raises(OutputError, match=rf"^checkpoint/{one} changed since this job began\. .*--restart"):
            Journal(tmp_path / "j", changed, SOURCE)
    fewer = HEADER.model_copy(update={"source_files": {"model-0.safetensors": files["model-0.safetensors"]}})
    with pytest.raises(OutputError, match=rf"{one} and 1 other changed since this job began"):
        Journal(tmp_path / "j", fewer, SOURCE)
    both = fewer.model_copy(update={"source": "other", "source_files": {**files, two: FileState(1, 5, 6, 2)}})
    with pytest.raises(OutputError, match=rf": source\. checkpoint/{two} changed since this job began\. Finish"):
        Journal(tmp_path / "j", both, SOURCE)


@pytest.mark.parametrize("first", ["{}", "[]", '{"threads":"many"}', '{"quantkit version":"0.0","outputs":3}'])
def test_a_first_line_of_another_kind_is_another_job(first: str, tmp_path: Path) -> None:
    (tmp_path / "j").write_text(f"{first}\n")
    with pytest.raises(OutputError, match="holds an unfinished job") as refused:
        Journal(tmp_path / "j", HEADER, SOURCE)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "j").read_text() == f"{first}\n"


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_the_step_is_done_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    written(path, ENTRIES[:1])
    journal = Journal(path, HEADER, SOURCE)

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
    again = Journal(path, HEADER, SOURCE)
    assert again.entries in (ENTRIES[:1], ENTRIES[:2])  # a line whose fsync failed may be there
    again.close()
