"""Long runs of zeros within a tensor: found wherever they lie, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats import open_source
from quantkit.formats.fp8_source import Fp8Source
from quantkit.formats.safetensors.file_holes import file_holes
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.formats.zero_runs import STEP, ZeroRun, zero_runs
from tests.tiny_models import write_shards

LEAST = 4 * STEP


def dense(n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    return torch.where(values == 0, 1, values).to(dtype)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40 * STEP), st.integers(0, 10 * STEP), st.sampled_from([torch.bfloat16, torch.float32]))
def test_a_run_is_found_if_and_only_if_it_is_long_enough(start: int, length: int, dtype: torch.dtype) -> None:
    flat = dense(40 * STEP + 17, dtype)
    flat[start : start + length] = 0
    stop = min(start + length, len(flat))
    expected = [ZeroRun(start, stop)] if stop - start >= LEAST else []
    assert list(zero_runs(flat, LEAST)) == expected


@pytest.mark.parametrize("length", [LEAST - 1, LEAST])
@pytest.mark.parametrize("at", [0, 1, STEP - 1, STEP, STEP + 1])
def test_the_shortest_run_at_any_place(at: int, length: int) -> None:
    flat = dense(20 * STEP)
    flat[at : at + length] = 0
    assert list(zero_runs(flat, LEAST)) == ([ZeroRun(at, at + length)] if length == LEAST else [])


def test_two_runs_and_zeros_by_chance() -> None:
    flat = dense(100 * STEP)
    flat[3 * STEP :: STEP] = 0  # each that is looked at behind the third
    flat[5 * STEP : 10 * STEP] = 0
    assert list(zero_runs(flat, LEAST)) == [ZeroRun(5 * STEP, 10 * STEP + 1)]
    flat = dense(100 * STEP)
    flat[10:50_000], flat[100_000:130_000] = 0, 0
    assert list(zero_runs(flat, LEAST)) == [ZeroRun(10, 50_000), ZeroRun(100_000, 130_000)]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_sparse_matrix_has_no_runs(share: float) -> None:
    """Pruned weights are zero here and there."""
    flat = dense(200 * STEP)
    flat[torch.rand(len(flat), generator=torch.Generator().manual_seed(1)) < share] = 0
    assert list(zero_runs(flat, LEAST)) == []


def fp8_source(folder: Path, codes: Tensor, scale: Tensor) -> Fp8Source:
    folder.mkdir()
    write_shards(folder, {"w": codes, "w_scale_inv": scale})
    return Fp8Source(SafetensorsSource(folder))


def ways_of(source: Fp8Source) -> list[object]:
    return [
        lambda: source.read("w"),
        lambda: source.read("w", (100, 600)),
        lambda: source.read_on("w", torch.device("cpu")),
        lambda: list(source.chunks("w", 2**18)),
    ]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_hole_is_refused_however_it_is_read(fp8: bool, tmp_path: Path) -> None:
    weight = dense(640 * 512).reshape(640, 512).clamp(0.01, 1)
    weight[300:400, :] = 0
    weight[400, :100] = 0
    if fp8:
        source = fp8_source(tmp_path / "m", weight.to(torch.float8_e4m3fn), torch.ones(5, 4))
    else:
        (tmp_path / "m").mkdir()
        write_shards(tmp_path / "m", {"w": weight})
        source = Fp8Source(SafetensorsSource(tmp_path / "m"))
    ways = ways_of(source) + ([lambda: source.read_stored("w")] if fp8 else [])
    with source:
        for read in ways:
            read()  # type: ignore[operator]
        source.refuse_zeros({"w": LEAST})
        for read in ways:
            with pytest.raises(SourceError, match=r"w: .* weights in a row are zero, in rows 3\d\d to \d+") as refused:
                read()  # type: ignore[operator]
            assert "allow_zeros: true" in refused.value.hint
        with pytest.raises(SourceError, match="51,300 weights in a row are zero, in rows 300 to 400"):
            source.read("w")
        source.refuse_zeros({"w": 51_301, "other": 1})
        for read in ways:
            read()  # type: ignore[operator]


def test_fp8_blocks_of_zeros_with_the_scale_zero_are_no_hole(tmp_path: Path) -> None:
    """Whoever stored them saw zeros; a hole in the codes leaves the scales."""
    weight = dense(640 * 512).reshape(640, 512).clamp(0.01, 1)
    weight[256:384] = 0
    scale = torch.ones(5, 4)
    scale[2] = 0
    with fp8_source(tmp_path / "m", weight.to(torch.float8_e4m3fn), scale) as source:
        source.refuse_zeros({"w": LEAST})
        for read in (*ways_of(source), lambda: source.read_stored("w"), lambda: source.read("w", (300, 500))):
            read()  # type: ignore[operator]


def sparse(path: Path) -> bool:
    """Whether the file system of ``path`` tells holes."""
    with path.open("wb") as file:
        file.truncate(2**20)
        return hasattr(os, "SEEK_HOLE") and os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 0


def test_bytes_that_were_never_written_are_seen_without_reading(tmp_path: Path) -> None:
    if not sparse(tmp_path / "probe"):
        pytest.skip("the file system tells no holes")
    (tmp_path / "m").mkdir()
    tensors = {"a": dense(2**18).reshape(512, 512), "b": dense(2**18).reshape(512, 512), "c": torch.ones(8)}
    write_shards(tmp_path / "m", tensors, shards=1)
    (path,) = (tmp_path / "m").glob("*.safetensors")
    with SafetensorsSource(tmp_path / "m") as source:
        assert file_holes(source.directory, source.headers, dict.fromkeys(tensors, 1)) == ()
        start = source.stored("b").start
    content = path.read_bytes()
    hole = range(-(-start // 4096) * 4096, -(-start // 4096) * 4096 + 2**17)
    path.unlink()
    with path.open("wb") as file:
        file.write(content[: hole.start])
        file.seek(hole.stop)
        file.write(content[hole.stop :])
    with SafetensorsSource(tmp_path / "m") as source:
        (line,) = file_holes(source.directory, source.headers, dict.fromkeys(tensors, 2**16))
        assert "b: 131,072 of its 524,288 bytes were never written" in line
        for least in ({"b": 2**16 + 1}, {"a": 1}, {}):
            assert file_holes(source.directory, source.headers, least) == ()


def test_the_shipped_model_has_no_holes(tmp_path: Path) -> None:
    nano = Path(__file__).parents[2] / "examples" / "nano-deepseek-v3"
    with open_source(nano) as source:
        source.refuse_zeros(dict.fromkeys(source.infos(), LEAST))
        for name, info in source.infos().items():
            if len(info.shape) > 1:
                source.read(name)
