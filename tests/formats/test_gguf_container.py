"""GGUF files equal what gguf-py writes, byte for byte, and are read back as they were meant."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantkit.errors import ConfigError, PlanError, SourceError
from quantkit.formats.gguf import values as v
from quantkit.formats.gguf.layout import GgufTensor, layout_gguf, padded, split_name
from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.gguf.types import TYPES_BY_ID, WRITABLE
from quantkit.formats.preallocated import PreallocatedFiles
from tests.counted import calls

KEY_VALUES = {
    "general.architecture": v.string("deepseek2"),
    "general.name": v.string("Zwölf Würfel 🎲"),
    "a.u8": v.u8(255),
    "a.i8": v.i8(-128),
    "a.u16": v.u16(65_535),
    "a.i16": v.i16(-32_768),
    "a.u32": v.u32(2**32 - 1),
    "a.i32": v.i32(-(2**31)),
    "a.u64": v.u64(2**64 - 1),
    "a.i64": v.i64(-(2**63)),
    "a.f32": v.f32(1e-6),
    "a.f64": v.f64(1e-6),
    "a.true": v.boolean(True),
    "a.false": v.boolean(False),
    "a.tokens": v.strings(["a", "", "ü", "Ġthe"]),
    "a.types": v.array("i32", [1, -3, 6]),
    "a.scores": v.array("f32", [0.1, -1e30]),
    "a.flags": v.array("bool", [True, False]),
}
TENSORS = [
    GgufTensor("token_embd.weight", (5, 64), "F32"),
    GgufTensor("blk.0.attn_norm.weight", (3,), "F32"),
    GgufTensor("blk.0.ffn_down_exps.weight", (3, 2, 512), "Q4_K"),
    GgufTensor("blk.0.attn_k_b.weight", (2, 3, 32), "Q8_0"),
    GgufTensor("blk.0.odd", (1, 2, 3, 5), "F16"),
    GgufTensor("blk.0.ids", (7,), "I32"),
    GgufTensor("blk.0.bf", (3, 1), "BF16"),
]


def data_of(tensor: GgufTensor) -> np.ndarray:
    return np.random.default_rng(len(tensor.name)).integers(0, 256, tensor.nbytes, np.uint8)


def write_ours(
    directory: Path, tensors: list[GgufTensor], limit: int | None, alignment: int, key_values: dict[str, v.Value]
) -> dict[str, bytes]:
    directory.mkdir()
    layout = layout_gguf("model", key_values, tensors, limit, alignment)
    writer = PreallocatedFiles.open(directory, layout)
    for tensor in reversed(tensors):
        data = data_of(tensor)
        writer.write(tensor.name, len(data) // 2, data[len(data) // 2 :].tobytes())
        writer.write(tensor.name, 0, memoryview(data[: len(data) // 2]))
    writer.sync()
    assert layout.data_bytes == sum(tensor.nbytes for tensor in tensors)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_theirs(
    directory: Path, tensors: list[GgufTensor], limit: int | None, alignment: int, key_values: dict[str, v.Value]
) -> dict[str, bytes]:
    directory.mkdir()
    writer = gguf.GGUFWriter(directory / "model.gguf", "deepseek2", split_max_size=limit or 0)
    for key, value in key_values.items():
        kind = gguf.GGUFValueType(v.STRING_ID if value.kind == "string" else v.NUMBERS[value.kind][0])
        if value.is_array:
            writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value.value, kind)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType(WRITABLE[tensor.kind].id)
        writer.add_tensor(tensor.name, data_of(tensor), raw_shape=tensor.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # gguf-py expects the shape of uint8 data in bytes; here shapes are given in weights.
    monkeypatch.setattr(gguf.gguf_writer, "quant_shape_from_byte_shape", lambda shape, _: shape)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)


@pytest.mark.parametrize("alignment", [32, 64, 8])
def test_one_file_equals_gguf_py(alignment: int, tmp_path: Path) -> None:
    ours = write_ours(tmp_path / "ours", TENSORS, None, alignment, KEY_VALUES)
    assert list(ours) == ["model.gguf"]
    assert ours == write_theirs(tmp_path / "theirs", TENSORS, None, alignment, KEY_VALUES)


@pytest.mark.parametrize("limit", [1, 1000, 2000, 3000, 10**9])
def test_splits_equal_gguf_py(limit: int, tmp_path: Path) -> None:
    ours = write_ours(tmp_path / "ours", TENSORS, limit, 32, KEY_VALUES)
    assert ours == write_theirs(tmp_path / "theirs", TENSORS, limit, 32, KEY_VALUES)
    assert len(ours) == {1: 7, 1000: 4, 2000: 3, 3000: 2, 10**9: 1}[limit]


def test_every_file_of_a_split_model_has_an_unusual_alignment() -> None:
    layout = layout_gguf("m", KEY_VALUES, TENSORS, 1, 128)
    assert all(b"general.alignment" in file.header and len(file.header) % 128 == 0 for file in layout.files)


def test_types_agree_with_gguf_py() -> None:
    for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        ours = TYPES_BY_ID[kind.value]
        if kind.name == "Q8_1":  # never stored in files; gguf-py still has the size of before its sums became float16
            nbytes = 36
        assert (ours.name, ours.block, ours.nbytes) == (kind.name, block, nbytes)


def test_a_value_that_does_not_fit_names_its_key() -> None:
    for value, kind in ((v.u32(2**40), "u32"), (v.f32(1e300), "f32"), (v.array("i32", [1, 2**31]), "array of i32")):
        with pytest.raises(ConfigError, match=rf"^GGUF key a\.b: the value does not fit the type {kind} \("):
            layout_gguf("m", {"a.b": value}, TENSORS)
    with pytest.raises(ConfigError, match="does not fit the type string"):
        layout_gguf("m", {"a.b": v.string("\ud800")}, TENSORS)


def test_too_many_files() -> None:
    many = [GgufTensor(f"t{n}", (1,), "F32") for n in range(65_536)]
    with pytest.raises(PlanError, match=r"65,536 files of at most 1 bytes would be needed, GGUF allows 65,535\. Use a"):
        layout_gguf("m", {}, many, 1)


def test_names_and_padding() -> None:
    assert split_name("DeepSeek-V3-Q4_K_M", 0, 9) == "DeepSeek-V3-Q4_K_M-00001-of-00009.gguf"
    assert [padded(n) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]


@pytest.mark.parametrize("limit", [None, 1000])
def test_the_reader_returns_what_was_written(limit: int | None, tmp_path: Path) -> None:
    files = write_ours(tmp_path / "m", TENSORS, limit, 32, KEY_VALUES)
    for path in (tmp_path / "m", *(tmp_path / "m" / name for name in files)):
        with GgufReader(path) as reader:
            assert {key: reader.key_values[key] for key in KEY_VALUES} == KEY_VALUES
            assert reader.get("a.f64") == 1e-6
            assert reader.get("absent") is None
            assert reader.path.name == min(files)
            assert [(t.name, t.shape, t.kind, t.nbytes) for t in reader.tensors.values()] == [
                (t.name, t.shape, t.kind, t.nbytes) for t in TENSORS
            ]
            for tensor in TENSORS:
                data = data_of(tensor)
                assert np.array_equal(reader.read(tensor.name).numpy(), data)
                assert np.array_equal(reader.read_array(tensor.name, 3, 3), data[3:6])
                assert len(reader.read_array(tensor.name, tensor.nbytes)) == 0


def test_gguf_py_reads_the_same_model(tmp_path: Path) -> None:
    write_ours(tmp_path / "m", TENSORS, None, 64, KEY_VALUES)
    theirs = gguf.GGUFReader(tmp_path / "m" / "model.gguf")
    ours = GgufReader(tmp_path / "m")
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert (tuple(tensor.shape[::-1]), tensor.tensor_type.name) == (entry.shape, entry.kind)
        assert (tensor.data_offset, tensor.n_bytes) == (entry.offset, entry.nbytes)
    for key in KEY_VALUES:
        content = theirs.fields[key].contents()
        assert (tuple(content) if isinstance(content, list) else content) == pytest.approx(ours.get(key))


def test_a_large_vocabulary_is_little_work(tmp_path: Path) -> None:
    words = [f"Ġwört{n}" for n in range(129_280)]
    key_values = {
        "tokenizer.ggml.tokens": v.strings(words),
        "tokenizer.ggml.token_type": v.array("i32", [1] * len(words)),
        "tokenizer.ggml.merges": v.strings([f"{n} {n}" for n in range(127_741)]),
    }
    write_ours(tmp_path / "m", TENSORS[1:2], None, 32, key_values)
    with GgufReader(tmp_path / "m") as reader:
        assert reader.key_values == key_values
    assert calls(lambda: GgufReader(tmp_path / "m").close()) < 30 * 2 * len(words)


def test_a_folder_must_hold_one_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no GGUF model, one was needed"):
        GgufReader(tmp_path)
    write_ours(tmp_path / "m", TENSORS, 1000, 32, KEY_VALUES)
    layout = layout_gguf("imatrix", {"general.type": v.string("imatrix")}, TENSORS[1:2])
    (tmp_path / "m" / "imatrix.gguf").write_bytes(layout.files[0].header + bytes(32))
    assert GgufReader(tmp_path / "m").path.name == "model-00001-of-00004.gguf"
    (tmp_path / "m" / "other.gguf").write_bytes(layout_gguf("o", {}, []).files[0].header)
    with pytest.raises(SourceError, match=r"holds 2 GGUF models \(model-00001-of-00004\.gguf, other\.gguf\)"):
        GgufReader(tmp_path / "m")


def test_a_split_set_must_be_whole_and_agree(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    files = write_ours(folder, TENSORS, 1000, 32, KEY_VALUES)
    first, second, third, fourth = (folder / name for name in sorted(files))
    third.rename(folder / "x")
    with pytest.raises(SourceError, match=r"model-00003-of-00004\.gguf of the 4 files of this model is missing"):
        GgufReader(first)
    fourth.rename(folder / "y")
    with pytest.raises(SourceError, match=r"model-00003-of-00004\.gguf and 1 more of the 4 files"):
        GgufReader(folder)
    (folder / "x").rename(fourth)
    (folder / "y").rename(third)
    with pytest.raises(SourceError, match=r"00003-of-00004\.gguf: split\.no is 3, 2 was needed"):
        GgufReader(first)
    (folder / "renamed.gguf").write_bytes(files[first.name])
    with pytest.raises(SourceError, match=r"renamed\.gguf: is one of 4 files by its header .* not by its name"):
        GgufReader(folder / "renamed.gguf")
    other = layout_gguf("model", {}, TENSORS, 2000).files[1]
    fourth.write_bytes(files[fourth.name])
    third.write_bytes(other.header + bytes(other.nbytes - len(other.header)))
    with pytest.raises(SourceError, match=r"00003-of-00004\.gguf: split\.no is 1"):
        GgufReader(first)
    count = b"split.tensors.count" + (5).to_bytes(4, "little")
    third.write_bytes(files[third.name].replace(count + b"\x07", count + b"\x08"))
    with pytest.raises(SourceError, match=r"claims 8 tensors in all files \(split\.tensors\.count\), they hold 7"):
        GgufReader(second)
    third.write_bytes(files[third.name])
    assert len(GgufReader(second).tensors) == 7
    plain = layout_gguf("m", {}, []).files[0].header
    (folder / "part-00001-of-00002.gguf").write_bytes(plain)
    with pytest.raises(SourceError, match=r"named as one of 2 files, but its header has no split\.count"):
        GgufReader(folder / "part-00001-of-00002.gguf")


def test_a_file_changed_under_the_reader(tmp_path: Path) -> None:
    write_ours(tmp_path / "m", TENSORS, None, 32, KEY_VALUES)
    path = tmp_path / "m" / "model.gguf"
    reader = GgufReader(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match="when it was opened"):
        reader.read("blk.0.bf")


def test_reading_headers_needs_no_torch(tmp_path: Path) -> None:
    write_ours(tmp_path / "m", TENSORS, None, 32, KEY_VALUES)
    code = (
        "import sys; from pathlib import Path; from quantkit.formats.gguf.reader import GgufReader;"
        f"GgufReader(Path({str(tmp_path / 'm')!r})); sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
