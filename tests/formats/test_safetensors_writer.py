"""Shards with their final headers, written in any order, taken up after a crash, and refused when they are not the
planned ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from quantkit.errors import OutputError
from quantkit.formats import preallocated
from quantkit.formats.preallocated import write_durably
from quantkit.formats.safetensors.header import INDEX_NAME, read_header
from quantkit.formats.safetensors.writer import ShardWriter, layout_shards
from quantkit.tensors import DTYPES, TensorInfo

GROUPS = [
    (TensorInfo("a.packed", (4, 2), "I32"), TensorInfo("a.scale", (4, 1), "BF16"), TensorInfo("a.shape", (2,), "I64")),
    (TensorInfo("norm", (3,), "BF16"),),
    (TensorInfo("b.packed", (5, 3), "U8"), TensorInfo("b.scale", (5, 1), "F32")),
    (TensorInfo("bias", (7,), "F32"),),
]


def values(info: TensorInfo) -> bytes:
    return hashlib.shake_128(info.name.encode()).digest(info.nbytes)


def fill(writer: ShardWriter) -> dict[str, str]:
    for group in reversed(GROUPS):
        for info in group:
            data = values(info)
            writer.write(info.name, 3, data[3:])
            writer.write(info.name, 0, memoryview(data)[:3])
    return writer.finish()


@pytest.mark.parametrize("limit", [1, 60, 90, 10**9])
def test_safetensors_reads_what_was_written(limit: int, tmp_path: Path) -> None:
    layout = layout_shards(GROUPS, limit)
    digests = fill(ShardWriter.open(tmp_path, layout))
    found = {}
    for shard in layout.shards:
        path = tmp_path / shard.file
        assert path.stat().st_size == shard.nbytes
        assert (len(shard.header)) % 8 == 0
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert list(read_header(path)) == [info.name for info in shard.tensors]  # our strict reader agrees
        found |= load_file(path)
    for info in (info for group in GROUPS for info in group):
        tensor = found[info.name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, getattr(torch, DTYPES[info.dtype][1]))
        assert tensor.view(torch.uint8).numpy().tobytes() == values(info)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for group in GROUPS for info in group)
    assert index["weight_map"] == {info.name: shard.file for shard in layout.shards for info in shard.tensors}
    assert digests == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}


def test_file_names_and_groups() -> None:
    layout = layout_shards(GROUPS, 60)
    assert [shard.file for shard in layout.shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [sorted(info.name for info in shard.tensors) for shard in layout.shards] == [
        ["a.packed", "a.scale", "a.shape"],
        ["b.packed", "b.scale", "norm"],
        ["bias"],
    ]
    assert [shard.file for shard in layout_shards(GROUPS).shards] == ["model.safetensors"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=12
    ),
    st.integers(1, 400),
)
def test_every_layout_is_gapless_and_aligned(tensors: list[tuple[str, list[int]]], limit: int) -> None:
    groups = [(TensorInfo(f"t{n}", tuple(shape), dtype),) for n, (dtype, shape) in enumerate(tensors)]
    layout = layout_shards(groups, limit)
    assert layout.data_bytes == sum(info.nbytes for (info,) in groups)
    for shard in layout.shards:
        end = len(shard.header)
        for info, offset in zip(shard.tensors, shard.offsets, strict=True):
            assert offset == end
            assert offset % DTYPES[info.dtype][0] == 0
            end += info.nbytes
        assert end == shard.nbytes


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_interrupted_job_is_taken_up(tmp_path: Path) -> None:
    layout = layout_shards(GROUPS, 60)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    fill(ShardWriter.open(whole, layout))
    writer = ShardWriter.open(broken, layout)
    assert writer.fresh
    writer.write("a.scale", 0, b"garbage!")
    writer.sync()
    again = ShardWriter.open(broken, layout)
    assert not again.fresh
    assert again.read("a.scale") == b"garbage!"
    fill(again)
    assert contents(whole) == contents(broken)


@pytest.mark.parametrize("renamed", range(4))
def test_a_crash_while_the_shards_are_made_leaves_a_fresh_start(renamed: int, tmp_path: Path) -> None:
    layout = layout_shards(GROUPS, 60)
    ShardWriter.open(tmp_path, layout)
    for shard in layout.shards[renamed:]:
        (tmp_path / shard.file).rename(tmp_path / f"{shard.file}.new")
    if renamed < 3:
        (tmp_path / f"{layout.shards[-1].file}.new").write_bytes(b"half")
    assert ShardWriter.open(tmp_path, layout).fresh == (renamed < 3)
    assert sorted(contents(tmp_path)) == [shard.file for shard in layout.shards]


def test_what_is_not_the_planned_shard_is_refused(tmp_path: Path) -> None:
    layout = layout_shards(GROUPS, 60)
    ShardWriter.open(tmp_path, layout)
    path = tmp_path / layout.shards[1].file
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(
        OutputError, match=rf"00002-of-00003\.safetensors: has {len(good) - 1} bytes, the plan needs {len(good)}"
    ):
        ShardWriter.open(tmp_path, layout)
    path.write_bytes(good.replace(b"norm", b"norn"))
    with pytest.raises(OutputError, match="another header"):
        ShardWriter.open(tmp_path, layout)
    path.unlink()
    with pytest.raises(OutputError, match="of an interrupted job is gone"):
        ShardWriter.open(tmp_path, layout)
    path.write_bytes(good)
    with pytest.raises(OutputError, match=r"is not one of the 1 shards of this job\. It is from another job"):
        ShardWriter.open(tmp_path, layout_shards(GROUPS))


def test_links_are_not_followed(tmp_path: Path) -> None:
    layout = layout_shards(GROUPS)
    out = tmp_path / "out"
    out.mkdir()
    ShardWriter.open(out, layout)
    (out / "model.safetensors").rename(tmp_path / "elsewhere")
    (out / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot be read or written"):
        ShardWriter.open(out, layout)


def test_a_disk_too_small_is_found_before_any_work(tmp_path: Path) -> None:
    huge = layout_shards([(TensorInfo("huge", (2**50,), "U8"),)])
    with pytest.raises(
        OutputError, match=r"needs 1,125,899,906,842,\d+ bytes \(1125899\.9 GB\), the disk has [\d,]+ \(.* GB\) free"
    ):
        ShardWriter.open(tmp_path, huge)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def allocate(fd: int, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preallocated, "_allocate", allocate)
    with pytest.raises(OutputError, match=r"the output needs [\d,]+ bytes .* free\. Free space"):
        ShardWriter.open(tmp_path, layout_shards(GROUPS, 60))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_writing_leaves_a_job_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_shards(GROUPS, 60)
    writer = ShardWriter.open(tmp_path, layout)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OutputError, match=r"the disk is full\. Free space and give the same command again"):
            writer.write("bias", 0, b"1234")
    fill(ShardWriter.open(tmp_path, layout))
    assert load_file(tmp_path / layout.shards[2].file)["bias"].shape == (7,)


def test_many_shards_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preallocated, "_MAX_OPEN", 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    writer = ShardWriter.open(tmp_path, layout_shards(GROUPS, 1))
    for group in GROUPS:
        writer.write(group[0].name, 0, values(group[0]))
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    writer.sync()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_small_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    write_durably(tmp_path / "x", b"one")
    write_durably(tmp_path / "x", b"two")
    assert contents(tmp_path) == {"x": b"two"}
    with pytest.raises(OutputError, match="cannot be read or written"):
        write_durably(tmp_path / "absent" / "x", b"")
