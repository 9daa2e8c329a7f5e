"""imatrix files: written in any order, read back, held against a model, and refused when they are damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantkit.errors import SourceError
from quantkit.formats.gguf import values as v
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, imatrix_layout, imatrix_tensors
from quantkit.formats.gguf.layout import GgufTensor, layout_gguf
from quantkit.formats.preallocated import FilesLayout, PreallocatedFiles, combined
from tests.formats.shards import assert_one_line

EXPERTS, HEADS = 3, 2
ENTRIES = [
    ImatrixEntry("blk.1.ffn_up_exps.weight", EXPERTS, 8, experts=True),
    ImatrixEntry("blk.0.attn_q_a.weight", 1, 8),
    ImatrixEntry("blk.0.attn_k_b.weight", HEADS, 4),
]
COUNTS = {"blk.1.ffn_up_exps.weight": [5, 0, 7], "blk.0.attn_q_a.weight": [64], "blk.0.attn_k_b.weight": [64] * HEADS}


def importance(entry: ImatrixEntry) -> np.ndarray:
    values = np.random.default_rng(len(entry.name)).random((entry.n_matrices, entry.in_features), np.float32)
    values[np.array(COUNTS[entry.name]) == 0] = 0
    return values


def fill(writer: PreallocatedFiles) -> None:
    for entry in ENTRIES:
        rows = [(e, e + 1) for e in reversed(range(entry.n_matrices))] if entry.experts else [(0, entry.n_matrices)]
        for start, stop in rows:
            stored = imatrix_tensors(importance(entry)[start:stop], COUNTS[entry.name][start:stop])
            for suffix, values in stored.items():
                writer.write(entry.name + suffix, start * values.nbytes, values.tobytes())
    writer.sync()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    layout = imatrix_layout(ENTRIES, ["wiki.txt", "code.txt"], 4, 512)
    fill(PreallocatedFiles.open(tmp_path, layout))
    return tmp_path / "imatrix.gguf"


def test_what_was_written_is_read(path: Path) -> None:
    with Imatrix.open(path) as imatrix:
        assert (imatrix.datasets, imatrix.chunk_count) == (("wiki.txt", "code.txt"), 4)
        for entry in ENTRIES:
            found = imatrix.of(entry.name, entry.n_matrices)
            assert found is not None
            values, counts = found
            expected = importance(entry)
            expected[np.array(COUNTS[entry.name]) == 0] = 1
            np.testing.assert_allclose(values, expected, rtol=1e-6)
            assert (values.dtype, counts.tolist()) == (np.float32, COUNTS[entry.name])
        whole = imatrix.of("blk.0.attn_k_b.weight")
        assert whole is not None
        assert whole[0].shape == (1, 8)
        assert imatrix.of("blk.9.attn_q_a.weight") is None


def test_gguf_py_finds_the_tensors_that_llama_cpp_writes(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    found = {tensor.name: (tensor.shape.tolist(), tensor.tensor_type.name) for tensor in reader.tensors}
    assert found == {
        "blk.0.attn_k_b.weight.in_sum2": ([8], "F32"),
        "blk.0.attn_k_b.weight.counts": ([1], "F32"),
        "blk.0.attn_q_a.weight.in_sum2": ([8], "F32"),
        "blk.0.attn_q_a.weight.counts": ([1], "F32"),
        "blk.1.ffn_up_exps.weight.in_sum2": ([8, 3], "F32"),
        "blk.1.ffn_up_exps.weight.counts": ([1, 3], "F32"),
    }
    data = {tensor.name: tensor.data for tensor in reader.tensors}
    assert data["blk.1.ffn_up_exps.weight.counts"].ravel().tolist() == [5, 0, 7]
    np.testing.assert_allclose(data["blk.1.ffn_up_exps.weight.in_sum2"][2], importance(ENTRIES[0])[2] * 7, rtol=1e-6)
    fields = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.txt", "code.txt"],
        "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 512,
    }


def test_it_is_written_beside_a_model_by_one_writer(tmp_path: Path) -> None:
    model = layout_gguf("m", {"general.type": v.string("model")}, [GgufTensor("blk.0.attn_q_a.weight", (4, 8), "F32")])
    both = combined(model, imatrix_layout(ENTRIES, [], 0, 512))
    writer = PreallocatedFiles.open(tmp_path, both)
    assert writer.fresh
    fill(writer)
    assert not PreallocatedFiles.open(tmp_path, both).fresh
    assert sorted(writer.sha256()) == ["imatrix.gguf", "m.gguf"]
    assert both.data_bytes == 4 * 8 * 4 + 4 * (24 + 3 + 8 + 1 + 8 + 1)
    assert Imatrix.open(tmp_path / "imatrix.gguf").datasets == ()


EXPECTED = {entry.name: (entry.n_matrices, entry.in_features) for entry in ENTRIES}


def test_it_is_held_against_a_model(path: Path) -> None:
    imatrix = Imatrix.open(path)
    assert imatrix.check(EXPECTED) == []
    assert imatrix.check({**EXPECTED, "output.weight": (1, 8)}) == ["output.weight"]
    for name, size, words in [
        ("blk.0.attn_q_a.weight", (1, 7168), ["has 8 values and 1 counts, this model needs 1 x 7,168 values."]),
        ("blk.1.ffn_up_exps.weight", (4, 8), ["has 24 values and 3 counts", "4 x 8 values"]),
        ("blk.1.ffn_up_exps.weight", (6, 4), ["24 values and 3 counts", "6 x 4 values"]),
        ("blk.0.attn_k_b.weight", (2, 5), ["2 x 5 values"]),
    ]:
        with pytest.raises(SourceError) as caught:
            imatrix.check({**EXPECTED, name: size})
        assert_one_line(caught.value, str(path), name, *words, "It is the imatrix of another model.")
    with pytest.raises(SourceError, match=r"\(2 more weights differ\)"):
        imatrix.check({name: (1, 3) for name in EXPECTED})
    with pytest.raises(SourceError, match=r"has none of the 2 weights of this model, such as x\."):
        imatrix.check({"x": (1, 8), "y": (1, 8)})
    with pytest.raises(SourceError, match="which are not those of 5 matrices"):
        imatrix.of("blk.0.attn_k_b.weight", 5)


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (-1.0, "negative"), (-np.inf, "not finite")]
)
@pytest.mark.parametrize("suffix", [".in_sum2", ".counts"])
def test_bad_values(path: Path, suffix: str, value: float, words: str) -> None:
    writer = PreallocatedFiles.open(path.parent, imatrix_layout(ENTRIES, ["wiki.txt", "code.txt"], 4, 512))
    writer.write(f"blk.1.ffn_up_exps.weight{suffix}", 4, struct.pack("<f", value))
    writer.sync()
    imatrix = Imatrix.open(path)
    assert imatrix.of("blk.0.attn_q_a.weight") is not None
    with pytest.raises(SourceError) as caught:
        imatrix.of("blk.1.ffn_up_exps.weight")
    assert_one_line(caught.value, str(path), "blk.1.ffn_up_exps.weight", words)


def test_a_count_that_cannot_be(path: Path) -> None:
    writer = PreallocatedFiles.open(path.parent, imatrix_layout(ENTRIES, ["wiki.txt", "code.txt"], 4, 512))
    writer.write("blk.0.attn_q_a.weight.counts", 0, struct.pack("<f", 1e30))
    writer.sync()
    with pytest.raises(SourceError, match=r"blk\.0\.attn_q_a\.weight: claims 1e\+30 tokens\."):
        Imatrix.open(path).of("blk.0.attn_q_a.weight")


def gguf_file(path: Path, key_values: dict[str, v.Value], tensors: list[GgufTensor]) -> Path:
    layout: FilesLayout = layout_gguf(path.stem, key_values, tensors)
    path.write_bytes(layout.files[0].header + bytes(layout.nbytes - len(layout.files[0].header)))
    return path


def test_what_is_no_imatrix(tmp_path: Path) -> None:
    sums, counts = ENTRIES[1].tensors()
    kind = {"general.type": v.string("imatrix")}
    path = tmp_path / "x.gguf"
    for key_values, tensors, words in [
        ({"general.type": v.string("model")}, [sums, counts], "has the general.type 'model', an imatrix was needed"),
        ({}, [sums, counts], "has no general.type"),
        ({"general.type": v.u32(1)}, [sums, counts], "general.type 1"),
        (kind, [sums], "blk.0.attn_q_a.weight lacks its tensor .counts"),
        (kind, [counts], "lacks its tensor .in_sum2"),
        (kind, [], "holds no weights"),
        (kind, [GgufTensor(sums.name, (8,), "F16"), counts], "in_sum2 is F16, F32 was needed"),
        (kind, [sums, GgufTensor(counts.name, (3,), "F32")], "has 8 values, no multiple of its 3 counts"),
    ]:
        with pytest.raises(SourceError) as caught:
            Imatrix.open(gguf_file(path, key_values, tensors))
        assert_one_line(caught.value, str(path), words)
    newer = [sums, counts, GgufTensor("blk.0.attn_q_a.weight.in_sum", (8,), "F32")]
    assert Imatrix.open(gguf_file(path, kind, newer)).sizes == {"blk.0.attn_q_a.weight": (8, 1)}


def dat_file(path: Path, entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> Path:
    data = struct.pack("<i", len(entries))
    for name, (chunks, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", chunks, len(values))
        data += np.array(values, "<f4").tobytes()
    path.write_bytes(data + tail)
    return path


DAT = {"blk.0.attn_q_a.weight": (4, [4.0, 8.0]), "blk.1.ffn_up_exps.weight": (2, [2.0, 4.0, 6.0, 8.0]), "z": (0, [3.0])}


def test_the_older_form(tmp_path: Path) -> None:
    tail = struct.pack("<ii", 4, 8) + b"wiki.txt"
    with Imatrix.open(dat_file(tmp_path / "imatrix.dat", DAT, tail)) as imatrix:
        assert (imatrix.datasets, imatrix.chunk_count) == (("wiki.txt",), 4)
        assert imatrix.sizes == {"blk.0.attn_q_a.weight": (2, 1), "blk.1.ffn_up_exps.weight": (4, 1), "z": (1, 1)}
        found = [imatrix.of("blk.0.attn_q_a.weight"), imatrix.of("blk.1.ffn_up_exps.weight", 2), imatrix.of("z")]
        assert [(pair[0].tolist(), pair[1].tolist()) for pair in found if pair] == [
            ([[1.0, 2.0]], [4]),
            ([[1.0, 2.0], [3.0, 4.0]], [2, 2]),
            ([[3.0]], [1]),
        ]
        assert imatrix.check({"blk.1.ffn_up_exps.weight": (2, 2), "q": (1, 1)}) == ["q"]
    for tail in (b"", b"\0" * 7, struct.pack("<ii", 4, 2**30), struct.pack("<ii", 4, -1)):
        assert Imatrix.open(dat_file(tmp_path / "imatrix.dat", DAT, tail)).datasets == ()


def test_damaged_files_of_the_older_form(tmp_path: Path) -> None:
    path = dat_file(tmp_path / "imatrix.dat", DAT)
    good = path.read_bytes()
    for data, words in [
        (b"", "inside its table"),
        (b"\1\0", "inside its table"),
        (b"some text", "counts no weights"),
        (bytes(100), "counts no weights"),
        (b"\1\0\0\0" + b"\xff" * 9, "name of weight 1 has a length of -1"),
        (b"\1\0\0\0" + struct.pack("<i", 2**30) + b"a", "has a length of 1,073,741,824"),
        (good[:-1], "truncated, 1 bytes of z are missing"),
        (good[:44], "truncated, 1 bytes of blk.0.attn_q_a.weight are missing"),
        (good.replace(b"attn_q_a", b"attn\n\n\n\n"), "holds control characters"),
        (good[:29] + struct.pack("<i", -1) + good[33:], "has 2 values of -1 chunks"),
        (good[:33] + struct.pack("<i", 0) + good[37:], "has 0 values"),
        (good[:33] + struct.pack("<i", 2**31 - 1) + good[37:], "truncated, 8,589,9"),
        (b"\2\0\0\0" + good[4:45] * 2, "occurs twice"),
    ]:
        path.write_bytes(data)
        with pytest.raises(SourceError) as caught:
            Imatrix.open(path)
        assert_one_line(caught.value, str(path), words)
