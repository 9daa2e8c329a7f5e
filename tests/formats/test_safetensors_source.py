"""A folder of shards gives back what the reference writer wrote, in any row range, and refuses incomplete folders."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import parse_json_object
from quantkit.formats.safetensors.reader import (
    SafetensorsSource,
    read_header,
    read_index,
    read_small,
    require_finite,
    row_ranges,
)
from quantkit.tensors import DTYPES, TensorInfo
from tests.formats.shards import assert_one_line, write_checkpoint, write_index


def one_of_each() -> dict[str, torch.Tensor]:
    """A (5, 3) tensor of every dtype, and odd shapes."""
    values = torch.arange(15).reshape(5, 3)
    tensors = {
        f"t.{name}": (values % 2 if name == "BOOL" else values + 1).to(getattr(torch, attribute))
        for name, (_, attribute) in DTYPES.items()
        if name != "F8_E8M0"
    }
    tensors["t.F8_E8M0"] = (values + 100).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {**tensors, "scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "cube": torch.randn(3, 2, 2)}


def equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = one_of_each()
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)}
    return write_checkpoint(tmp_path / "model", parts)


def test_round_trip_with_the_reference_writer(folder: Path) -> None:
    with SafetensorsSource(folder) as source:
        written = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        assert set(source.infos()) == set(written)
        for name, tensor in written.items():
            info = source.infos()[name]
            assert info == TensorInfo(name, tuple(tensor.shape), info.dtype)
            assert equal_bytes(source.read(name), tensor), name
        assert source.unlisted == ()


def test_infos_are_in_file_order(folder: Path) -> None:
    source = SafetensorsSource(folder)
    assert [source.stored(name) for name in source.infos()] == [
        stored for path in sorted(folder.glob("*.safetensors")) for stored in read_header(path).values()
    ]


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from quantkit.formats import open_source; source = open_source(sys.argv[1]);"
        "source.prefetch(list(source.infos())); source.fingerprint(); assert 'torch' not in sys.modules"
    )
    write_checkpoint(tmp_path, {"model.safetensors": {"w": torch.ones(2)}})
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rows=st.integers(0, 9), columns=st.integers(1, 4))
def test_rows_and_chunks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, columns: int
) -> None:
    table = torch.randn(rows, columns)
    folder = write_checkpoint(tmp_path_factory.mktemp("m"), {"model.safetensors": {"pad": torch.ones(3), "w": table}})
    with SafetensorsSource(folder) as source:
        start, stop = sorted((data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))))
        assert torch.equal(source.read("w", (start, stop)), table[start:stop])
        indices = data.draw(st.lists(st.integers(0, rows - 1), max_size=12)) if rows else []
        assert torch.equal(source.read_rows("w", indices), table[torch.tensor(indices, dtype=torch.int64)])
        max_bytes = data.draw(st.integers(1, 100))
        pieces = list(source.chunks("w", max_bytes))
        assert torch.equal(torch.cat(pieces), table)
        assert all(piece.nbytes <= max(max_bytes, 4 * columns) for piece in pieces)


def test_scalar_and_empty_in_chunks(folder: Path) -> None:
    source = SafetensorsSource(folder)
    assert [piece.tolist() for piece in source.chunks("scalar", 1)] == [[2.5]]
    assert [piece.shape for piece in source.chunks("none", 100)] == [(0, 4)]
    assert list(row_ranges(TensorInfo("w", (5, 2), "F32"), 16)) == [(0, 2), (2, 4), (4, 5)]


def test_row_outside_is_refused(folder: Path) -> None:
    source = SafetensorsSource(folder)
    for indices in ([0, 5], [-1, 0]):
        with pytest.raises(SourceError) as caught:
            source.read_rows("t.F32", indices)
        assert_one_line(caught.value, ".safetensors", "t.F32", "5 rows", f"row {indices[0] or 5}")


def test_unknown_name_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match="holds no tensor nothing"):
        SafetensorsSource(folder).read("nothing")


def n_descriptors() -> int:
    """Open file descriptors of this process."""
    return len(list(Path("/dev/fd").iterdir()))


def test_threads_read_the_right_bytes_with_few_descriptors(tmp_path: Path) -> None:
    shards = {f"model-{i:05d}.safetensors": {f"w{i}": torch.full((64, 8), float(i))} for i in range(100)}
    source = SafetensorsSource(write_checkpoint(tmp_path / "m", shards))
    before = n_descriptors()

    def read(i: int) -> bool:
        return bool((source.read(f"w{i % 100}", (i % 64, i % 64 + 1)) == i % 100).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(2000)))
    source.prefetch([f"w{i}" for i in range(100)])
    assert source.read("w99").sum() == 99 * 64 * 8
    assert before + 50 < n_descriptors() <= before + 64
    source.close()
    assert n_descriptors() == before
    assert source.read("w3").sum() == 3 * 64 * 8
    source.close()


# Folders


def test_single_file_and_numbered_shards_without_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(SourceError) as caught:
        SafetensorsSource(tmp_path)
    assert_one_line(caught.value, "model-00002-of-00002.safetensors", "missing")
    save_file({"b": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    assert set(SafetensorsSource(tmp_path).infos()) == {"a", "b"}
    save_file({"all": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(SafetensorsSource(tmp_path).infos()) == {"all"}


def test_no_folder_no_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no \*\.safetensors"):
        SafetensorsSource(tmp_path)
    with pytest.raises(SourceError, match="is not a folder"):
        SafetensorsSource(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="is not a folder"):
        SafetensorsSource(tmp_path / "file")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        SafetensorsSource(folder)
    assert_one_line(caught.value, *words)


def test_shard_missing_or_truncated(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(folder, shard.name, "truncated", list(read_index(folder))[0][:1])
    shard.unlink()
    refused(folder, shard.name, "no such file")


def test_index_and_shards_disagree(folder: Path) -> None:
    weight_map = read_index(folder)
    one, other = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    write_index(folder, {**weight_map, "ghost": one})
    refused(folder, "index.json", "ghost", one, "no shard holds it")
    name = next(name for name, file in weight_map.items() if file == one)
    write_index(folder, {**weight_map, name: other})
    refused(folder, name, other, f"it is in {one}")
    write_index(folder, {key: file for key, file in weight_map.items() if key != name})
    source = SafetensorsSource(folder)
    assert source.unlisted == (name,)
    assert name not in source.infos()


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"a.safetensors": {"w": torch.ones(2)}, "b.safetensors": {"w": torch.ones(2), "v": torch.ones(1)}}
    folder = write_checkpoint(tmp_path / "m", shards)
    write_index(folder, {"w": "a.safetensors", "v": "b.safetensors"})
    refused(folder, "w: is in two shards", "a.safetensors and b.safetensors")


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "a\\b.safetensors", "C:x.safetensors"]
    + ["x.bin", "x\n.safetensors", ".x.safetensors", "\0.safetensors"],
)
def test_index_paths_that_escape(folder: Path, file: str) -> None:
    write_index(folder, {"evil.weight": file})
    refused(folder, "index.json", "evil.weight", "plain name")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"w": 1}, {"w": None}, {"w": ["a.safetensors"]}])
def test_malformed_weight_map(folder: Path, weight_map: object) -> None:
    write_index(folder, weight_map)
    refused(folder, "index.json", "weight_map")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {"a": "x", "a": "y"}}', "\ufeff{}"])
def test_malformed_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "index.json")


def test_dangling_index_is_not_taken_for_absent(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.unlink()
    index.symlink_to(folder / "gone")
    refused(folder, "index.json", "no such file")


def test_file_that_changes_after_opening(folder: Path) -> None:
    source = SafetensorsSource(folder)
    path = source.path_of("t.F32")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SourceError) as caught:
        source.read("t.F32")
    assert_one_line(caught.value, path.name, "when it was opened")


def test_file_that_shrinks_while_open(folder: Path) -> None:
    with SafetensorsSource(folder) as source:
        source.read("t.F32")
        os.truncate(source.path_of("t.F32"), 8)
        with pytest.raises(SourceError) as caught:
            source.read("t.F32")
        assert_one_line(caught.value, source.path_of("t.F32").name, "t.F32", "ends 60 bytes too early")


# Values


@settings(deadline=None, max_examples=80)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    n=st.integers(1, 300),
    at=st.integers(0, 299),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, n: int, at: int, bad: float) -> None:
    tensor = torch.full((n,), float(torch.finfo(dtype).max), dtype=dtype)  # their sum overflows, yet each is finite
    require_finite("w", "f.safetensors", tensor)
    tensor[at % n] = bad
    with pytest.raises(SourceError) as caught:
        require_finite("w", "f.safetensors", tensor)
    assert_one_line(caught.value, "f.safetensors: w:", f"1 of {n} values", f"[{at % n}]")


@pytest.mark.parametrize(("dtype", "first_bad"), [(torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0x7C)])
def test_float8_codes(dtype: torch.dtype, first_bad: int) -> None:
    for bits in range(256):
        codes = torch.tensor([[0, bits]], dtype=torch.uint8).view(dtype)
        if bool(torch.isfinite(codes.float()).all()):
            require_finite("w", "f", codes)
        else:
            assert bits & 0x7F >= first_bad
            with pytest.raises(SourceError, match=r"first at \[0, 1\]"):
                require_finite("w", "f", codes)


def test_bad_values_are_refused_by_every_way_of_reading(tmp_path: Path) -> None:
    weight = torch.ones(4, 3)
    weight[2, 1] = float("nan")
    folder = write_checkpoint(tmp_path / "m", {"model.safetensors": {"layer.weight": weight}})
    source = SafetensorsSource(folder)
    ways = (
        lambda: source.read("layer.weight"),
        lambda: source.read_rows("layer.weight", [2, 0]),
        lambda: list(source.chunks("layer.weight", 12)),
    )
    for read in ways:
        with pytest.raises(SourceError) as caught:
            read()
        assert_one_line(caught.value, "model.safetensors", "layer.weight", "NaN")
    assert torch.equal(source.read("layer.weight", (0, 2)), weight[:2])


# Fingerprint


def test_fingerprint_follows_content_not_time(folder: Path, tmp_path: Path) -> None:
    before = SafetensorsSource(folder).fingerprint()
    shard = folder / "model-00001-of-00003.safetensors"
    os.utime(shard, (1, 1))
    assert SafetensorsSource(folder).fingerprint() == before
    twin = write_checkpoint(tmp_path / "twin", {})
    for path in folder.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    assert SafetensorsSource(twin).fingerprint() == before

    (twin / "config.json").write_text(json.dumps({"a": 1}))
    changed = {before, SafetensorsSource(twin).fingerprint()}
    tensors = load_file(shard)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, twin / shard.name, {"format": "pt"})
    changed.add(SafetensorsSource(twin).fingerprint())
    assert len(changed) == 3


def test_fingerprint_tells_a_finetune_from_its_base(tmp_path: Path) -> None:
    prints = {
        SafetensorsSource(
            write_checkpoint(tmp_path / str(seed), {"model.safetensors": {"w": torch.full((100, 100), float(seed))}})
        ).fingerprint()
        for seed in range(3)
    }
    assert len(prints) == 3


def test_json_numbers_of_many_digits_stay_text() -> None:
    assert parse_json_object(b'{"a": 1234567890123456789, "b": 99999999999999999999}', "x") == {
        "a": 1234567890123456789,
        "b": "99999999999999999999",
    }


def test_an_index_that_cannot_be_read_to_its_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, _: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdopen", lambda fd, mode: (os.close(fd), Broken())[1])
    with pytest.raises(SourceError, match=r"config\.json: cannot be read \(Input/output error\)\.$"):
        read_small(tmp_path / "config.json")
