"""Row stores: memory and file give the same numbers for any sequence of operations; disk faults are one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate import hidden_states
from quantkit.calibrate.hidden_states import FileRows, MemoryRows, RowStore, load
from quantkit.errors import OutputError

N_ROWS, LENGTH, WIDTH = 5, 4, 3
TOKENS = N_ROWS * LENGTH


def both(folder: Path) -> tuple[MemoryRows, FileRows]:
    return MemoryRows(N_ROWS, LENGTH, WIDTH), FileRows(folder / "rows", N_ROWS, LENGTH, WIDTH)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_memory_and_file_are_the_same_store(
    data: st.DataObject, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    memory, file = both(tmp_path_factory.mktemp("store"))
    random = torch.Generator().manual_seed(seed)
    expected = torch.zeros(TOKENS, WIDTH)
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, N_ROWS - 1))
        stop = data.draw(st.integers(start + 1, N_ROWS))
        tokens = torch.tensor(sorted(data.draw(st.sets(st.integers(0, TOKENS - 1)))), dtype=torch.int64)
        rows = torch.randn(stop - start, LENGTH, WIDTH, generator=random)
        values = torch.randn(len(tokens), WIDTH, generator=random)
        expected[start * LENGTH : stop * LENGTH] = rows.view(-1, WIDTH)
        shares = torch.rand(len(tokens), generator=random)
        expected[tokens] += values * shares[:, None]
        for store in (memory, file):
            store.write(start, rows if seed % 2 else rows.view(-1, WIDTH))
            store.add(tokens, values, shares)
            assert torch.equal(store.read(start, stop), expected.view(N_ROWS, LENGTH, WIDTH)[start:stop])
            assert torch.equal(store.gather(tokens), expected[tokens])
    file.close()


def test_what_is_gathered_is_a_copy(tmp_path: Path) -> None:
    for store in both(tmp_path):
        tokens = torch.tensor([1, 2])
        store.gather(tokens).fill_(7)
        assert not store.read(0, 1).any()


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
def test_saved_rows_load_into_either_kind(from_file: bool, to_file: bool, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source, target = both(tmp_path / "a")[from_file], both(tmp_path / "b")[to_file]
    rows = torch.randn(N_ROWS, LENGTH, WIDTH)
    source.write(0, rows)
    source.save(tmp_path / "saved")
    load(tmp_path / "saved", target)
    assert torch.equal(target.read(0, N_ROWS), rows)


def test_a_file_store_leaves_nothing_however_the_process_ends(tmp_path: Path) -> None:
    store = FileRows(tmp_path / "rows", N_ROWS, LENGTH, WIDTH)
    assert not list(tmp_path.iterdir())
    store.close()


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "_IO_BYTES", 7)
    store = FileRows(tmp_path / "rows", N_ROWS, LENGTH, WIDTH)
    rows = torch.randn(N_ROWS, LENGTH, WIDTH)
    store.write(0, rows)
    assert torch.equal(store.read(0, N_ROWS), rows)
    store.close()


@pytest.mark.parametrize("content", [None, b"", b"\0" * 7, b"\0" * (TOKENS * WIDTH * 4)])
def test_a_missing_or_damaged_resume_point_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "saved").write_bytes(content)
    with pytest.raises(OutputError, match=r"bytes, the hidden states .* have 244\. Begin anew"):
        load(tmp_path / "saved", MemoryRows(N_ROWS, LENGTH, WIDTH))


@pytest.mark.parametrize("place", [0, 100, TOKENS * WIDTH * 4 + 3])
def test_a_flipped_bit_in_a_resume_point_is_refused(place: int, tmp_path: Path) -> None:
    store = MemoryRows(N_ROWS, LENGTH, WIDTH)
    store.write(0, torch.randn(N_ROWS, LENGTH, WIDTH))
    store.save(tmp_path / "saved")
    load(tmp_path / "saved", MemoryRows(N_ROWS, LENGTH, WIDTH))
    content = bytearray((tmp_path / "saved").read_bytes())
    content[place] ^= 1
    (tmp_path / "saved").write_bytes(content)
    with pytest.raises(OutputError, match=r"saved: was damaged since it was saved\. Begin anew"):
        load(tmp_path / "saved", MemoryRows(N_ROWS, LENGTH, WIDTH))


def _write(store: RowStore, folder: Path) -> None:
    store.write(0, torch.ones(1, LENGTH, WIDTH))


def _add(store: RowStore, folder: Path) -> None:
    store.add(torch.tensor([3]), torch.ones(1, WIDTH), torch.ones(1))


def _save(store: RowStore, folder: Path) -> None:
    store.save(folder / "saved")


@pytest.mark.parametrize(("kind", "step"), [(1, _write), (1, _add), (0, _save), (1, _save)])
def test_a_full_disk_is_one_line(kind: int, step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = both(tmp_path)[kind]

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("quantkit.calibrate.hidden_states.os.pwrite", full)
    with pytest.raises(OutputError, match=r"the disk is full\. Free space"):
        step(store, tmp_path)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_store_of_half_the_size_holds_bfloat16(in_file: bool, tmp_path: Path) -> None:
    size = (N_ROWS, LENGTH, WIDTH)
    store: RowStore = MemoryRows(*size, dtype=torch.bfloat16)
    if in_file:
        store = FileRows(tmp_path / "rows", *size, torch.bfloat16)
    rows = torch.randn(size, generator=torch.Generator().manual_seed(1))
    store.write(0, rows)
    assert torch.equal(store.read(0, N_ROWS), rows.bfloat16())
    tokens = torch.tensor([1, 4, 5])
    assert torch.equal(store.gather(tokens), rows.bfloat16().flatten(0, 1)[tokens])
    store.save(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_size == rows.numel() * 2 + 4
    assert store.nbytes == (0 if in_file else rows.numel() * 2)
    store.close()
    assert store.nbytes == 0
