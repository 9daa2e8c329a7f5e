"""FP8-block weights decode to exactly round_to_bf16(code * scale), in any row range; broken pairs are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantkit.errors import SourceError
from quantkit.formats import open_source
from quantkit.formats.fp8_source import Fp8Source, decode_blocks
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.tensors import TensorInfo
from tests.formats.shards import FLOAT8_CONFIG, assert_one_line, random_float8, write_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = NAME + "_scale_inv"


def decoded(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """The oracle: one block at a time, float32 product, torch's own rounding to BF16."""
    weight = torch.empty(codes.shape, dtype=torch.bfloat16)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            weight[tile] = (codes[tile].to(torch.float32) * scale[i, j].to(torch.float32)).to(torch.bfloat16)
    return weight


def checkpoint(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, object] | None = None) -> Path:
    """Every tensor in a shard of its own, so that no pair shares a file."""
    shards = {f"model-{i:05d}.safetensors": {name: tensor} for i, (name, tensor) in enumerate(tensors.items())}
    return write_checkpoint(directory, shards, FLOAT8_CONFIG if config is None else config)


def pair(rows: int = 200, columns: int = 300, seed: int = 0) -> dict[str, torch.Tensor]:
    codes, scale = random_float8(rows, columns, seed)
    return {SCALE: scale, NAME: codes}


def test_every_code_of_one_block() -> None:
    bits = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    codes = torch.where((bits & 0x7F) == 0x7F, 0, bits).to(torch.uint8).view(torch.float8_e4m3fn)
    for scale in (1.0, 1 / 3, 2.0**-126, 3e-41, 7e35):
        blocks = torch.tensor([[scale]], dtype=torch.float32)
        assert torch.equal(decode_blocks(codes, blocks).view(torch.int16), decoded(codes, blocks).view(torch.int16))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_any_row_range_with_small_blocks(data: st.DataObject, rows: int, columns: int, seed: int) -> None:
    block = (data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)))
    codes, _ = random_float8(rows, columns, seed)
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.01
    start, stop = sorted((data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))))
    needed = scale[start // block[0] : -(-stop // block[0])]
    weight = decode_blocks(codes[start:stop], needed, block, start % block[0])
    assert torch.equal(weight, decoded(codes, scale, block)[start:stop])


def test_source_shows_bf16_and_reads_any_rows_across_shards(tmp_path: Path) -> None:
    tensors = pair(300, 200)
    tensors["model.norm.weight"] = torch.ones(7, dtype=torch.bfloat16)
    source = open_source(checkpoint(tmp_path, tensors))
    assert source.infos() == {
        NAME: TensorInfo(NAME, (300, 200), "BF16"),
        "model.norm.weight": TensorInfo("model.norm.weight", (7,), "BF16"),
    }
    assert source.stored_as(NAME)
    assert not source.stored_as("model.norm.weight")
    expected = decoded(tensors[NAME], tensors[SCALE])
    assert torch.equal(source.read(NAME), expected)
    for rows in ((0, 300), (0, 1), (127, 129), (128, 256), (100, 299), (299, 300), (256, 300), (5, 5), (128, 128)):
        assert torch.equal(source.read(NAME, rows), expected[rows[0] : rows[1]]), rows
    assert torch.equal(source.read_rows(NAME, [299, 3, 3, 128]), expected[[299, 3, 3, 128]])
    assert source.read_rows(NAME, []).shape == (0, 200)
    pieces = list(source.chunks(NAME, 64 * 400))
    assert torch.equal(torch.cat(pieces), expected)
    assert max(piece.nbytes for piece in pieces) <= 64 * 400
    source.prefetch([NAME, "model.norm.weight"])
    assert torch.equal(torch.cat(list(source.chunks("model.norm.weight", 4))), torch.ones(7, dtype=torch.bfloat16))
    source.close()


def test_stored_pair_comes_back_exactly(tmp_path: Path) -> None:
    tensors = pair()
    source = open_source(checkpoint(tmp_path, tensors))
    codes, scale = source.read_stored(NAME).values()
    assert torch.equal(codes.view(torch.uint8), tensors[NAME].view(torch.uint8))
    assert torch.equal(scale, tensors[SCALE])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_in_narrower_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = pair()
    tensors[SCALE] = (2.0 ** torch.arange(-3, 3).reshape(2, 3).float()).to(dtype)
    source = open_source(checkpoint(tmp_path, tensors))
    assert torch.equal(source.read(NAME), decoded(tensors[NAME], tensors[SCALE]))
    assert source.read_stored(NAME)["scale"].dtype == dtype


def test_block_size_from_config(tmp_path: Path) -> None:
    codes, _ = random_float8(10, 12, 1)
    scale = torch.rand(3, 2) + 0.5
    section = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8]}
    source = open_source(checkpoint(tmp_path, {NAME: codes, SCALE: scale}, {"quantization_config": section}))
    assert torch.equal(source.read(NAME, (3, 9)), decoded(codes, scale, (4, 8))[3:9])


def test_plain_checkpoint_passes_through(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    source = open_source(str(checkpoint(tmp_path, {"w": weight}, {"hidden_size": 4})))
    assert source.config == {"hidden_size": 4}
    assert source.directory == tmp_path
    assert source.infos() == SafetensorsSource(tmp_path).infos()
    assert torch.equal(source.read("w", (1, 3)), weight[1:3])
    assert torch.equal(source.read_rows("w", [3, 0]), weight[[3, 0]])
    assert source.fingerprint() == SafetensorsSource(tmp_path).fingerprint()
    assert Fp8Source(SafetensorsSource(tmp_path)).config == {}


# Broken pairs


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(folder)
    assert_one_line(caught.value, str(folder), *words)


def test_scale_missing(tmp_path: Path) -> None:
    tensors = pair()
    del tensors[SCALE]
    refused(checkpoint(tmp_path, tensors), "model-00000.safetensors", NAME, f"{SCALE} is missing")


def test_scale_unlisted(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, pair())
    index = folder / "model.safetensors.index.json"
    both = {NAME: "model-00001.safetensors", "other": "model-00000.safetensors"}
    save_file({SCALE: pair()[SCALE], "other": torch.ones(1)}, folder / "model-00000.safetensors")
    index.write_text(json.dumps({"weight_map": both}))
    refused(folder, NAME, "missing", "index does not list it")


def test_weight_missing(tmp_path: Path) -> None:
    tensors = pair()
    tensors["lost.weight_scale_inv"] = torch.ones(1, 1)
    refused(
        checkpoint(tmp_path, tensors),
        "model-00002.safetensors",
        "lost.weight_scale_inv",
        "lost.weight, which is missing",
    )


def test_scale_left_behind(tmp_path: Path) -> None:
    tensors = pair()
    tensors["cast.weight"] = torch.ones(4, 4, dtype=torch.bfloat16)
    tensors["cast.weight_scale_inv"] = torch.ones(1, 1)
    refused(checkpoint(tmp_path, tensors), "cast.weight_scale_inv", "which is BF16, not FP8")


@pytest.mark.parametrize("shape", [(3, 2), (2, 2), (6,), (2, 3, 1), (1, 1), ()])
def test_scale_of_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {**pair(), SCALE: torch.ones(shape)}
    refused(checkpoint(tmp_path, tensors), SCALE, str(list(shape)), "[2, 3] was needed", "weight_block_size")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.uint8])
def test_scale_of_wrong_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**pair(), SCALE: torch.ones(2, 3, dtype=dtype)}
    refused(checkpoint(tmp_path, tensors), "model-00000.safetensors", SCALE, "dtype", "F32")


def test_float8_that_is_no_e4m3_matrix(tmp_path: Path) -> None:
    refused(checkpoint(tmp_path, {**pair(), "v": torch.ones(3).to(torch.float8_e4m3fn)}), "v: is F8_E4M3 [3]")
    refused(checkpoint(tmp_path, {**pair(), "v": torch.ones(3, 3).to(torch.float8_e5m2)}), "v: is F8_E5M2 [3, 3]")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_of_no_use(tmp_path: Path, bad: float) -> None:
    tensors = pair()
    tensors[SCALE][1, 2] = bad
    source = open_source(checkpoint(tmp_path, tensors))
    assert source.read(NAME, (0, 128)).shape == (128, 300)
    for read in (lambda: source.read(NAME), lambda: source.read_stored(NAME), lambda: source.read(NAME, (199, 200))):
        with pytest.raises(SourceError) as caught:
            read()
        assert_one_line(caught.value, "model-00000.safetensors", SCALE)


@pytest.mark.parametrize("zero", [0x00, 0x80])
def test_a_block_of_zeros_may_have_the_scale_zero(tmp_path: Path, zero: int) -> None:
    tensors = pair()
    tensors[SCALE][1, 2] = 0.0
    tensors[NAME].view(torch.uint8)[128:, 256:] = zero
    source = open_source(checkpoint(tmp_path, tensors))
    assert not source.read(NAME)[128:, 256:].any()
    assert source.read(NAME)[128:, :256].any()
    assert not source.read(NAME, (199, 200))[:, 256:].any()
    assert torch.equal(source.read_on(NAME, torch.device("cpu")), source.read(NAME))
    assert source.read_stored(NAME)["scale"][1, 2] == 0


def test_a_matrix_of_zero_scales_is_a_hole_in_a_file(tmp_path: Path) -> None:
    tensors = pair()
    tensors[SCALE].zero_()
    tensors[NAME].view(torch.uint8).zero_()
    with pytest.raises(SourceError, match="holds only zeros"):
        open_source(checkpoint(tmp_path, tensors)).read(NAME)


def test_codes_that_are_not_numbers(tmp_path: Path) -> None:
    tensors = pair()
    tensors[NAME].view(torch.uint8)[7, 9] = 0xFF
    source = open_source(checkpoint(tmp_path, tensors))
    for read in (lambda: source.read(NAME), lambda: source.read_stored(NAME)):
        with pytest.raises(SourceError) as caught:
            read()
        assert_one_line(caught.value, "model-00001.safetensors", NAME, "[7, 9]")


def test_product_that_overflows(tmp_path: Path) -> None:
    codes = torch.full((2, 2), 448.0).to(torch.float8_e4m3fn)
    source = open_source(checkpoint(tmp_path, {NAME: codes, SCALE: torch.tensor([[1e38]])}))
    with pytest.raises(SourceError, match="4 of 4 values are NaN or infinite"):
        source.read(NAME)


# config.json


def test_config_and_shards_disagree(tmp_path: Path) -> None:
    refused(checkpoint(tmp_path / "a", {"w": torch.ones(2, 2)}), "config.json", "no tensor is FP8", "stale")
    refused(checkpoint(tmp_path / "b", pair(), {"hidden_size": 1}), NAME, "no quantization_config", "weight_block_size")


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "bitsandbytes"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_already_quantised(tmp_path: Path, method: str, key: str) -> None:
    folder = checkpoint(tmp_path, {"w": torch.ones(2, 2)}, {key: {"quant_method": method, "bits": 4}})
    refused(folder, "config.json", method, "already quantised", "original")


def test_scales_of_deepseek_v4_are_named(tmp_path: Path) -> None:
    scale, codes = pair().values()
    folder = checkpoint(tmp_path, {"layers.0.attn.wq_a.weight": codes, "layers.0.attn.wq_a.scale": scale})
    refused(folder, "layers.0.attn.wq_a.weight_scale_inv is missing", "DeepSeek V4")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("vision", [False, True])
def test_packed_without_groups(tmp_path: Path, key: str, vision: bool) -> None:
    config = {key: {"quant_method": "compressed-tensors"}}
    folder = checkpoint(tmp_path, {"w": torch.ones(2, 2)}, {"text_config": config} if vision else config)
    refused(folder, "config.json", "config_groups", "an object was needed")


@pytest.mark.parametrize("section", ["fp8", ["fp8"], {"bits": 4}, {"quant_method": 8}, 1])
def test_odd_quantization_config(tmp_path: Path, section: object) -> None:
    refused(checkpoint(tmp_path, pair(), {"quantization_config": section}), "config.json", "'unknown'")


@pytest.mark.parametrize("block", [None, 128, [128], [128, 0], [128, -1], [128, 128, 1], ["128", 128], [True, 128], []])
def test_odd_block_size(tmp_path: Path, block: object) -> None:
    section = {"quant_method": "fp8", "weight_block_size": block}
    refused(
        checkpoint(tmp_path, pair(), {"quantization_config": section}), "weight_block_size", "two positive integers"
    )


def test_odd_format(tmp_path: Path) -> None:
    section = {"quant_method": "fp8", "fmt": "e5m2"}
    refused(checkpoint(tmp_path, pair(), {"quantization_config": section}), "config.json", "'e5m2'")


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", '{"a": 1, "a": 2}', "[" * 100_000, "\ud800"])
def test_bad_config(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path, {"w": torch.ones(1)})
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, "config.json")


def test_no_config_and_no_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", {"w": torch.ones(1)})
    (folder / "config.json").unlink()
    refused(folder, "config.json", "no such file")
    (folder / "config.json").mkdir()
    refused(folder, "config.json", "not a regular file")
    refused(tmp_path / "absent", "no such folder")
    with pytest.raises(SourceError, match="no such folder"):
        open_source(tmp_path / "absent\0")


# A trained checkpoint, where it is present


def shared_model(name: str) -> Path:
    root = Path(os.environ.get("QUANTKIT_SHARED", Path(__file__).parents[2].parent / "shared"))
    folder = root / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not present")
    return folder


def test_trained_checkpoint_decodes_to_code_times_scale() -> None:
    source = open_source(shared_model("tiny-deepseek-v3-fp8"))
    weights = [name for name in source.infos() if source.stored_as(name)]
    assert len(weights) > 100
    for name in weights:
        codes, scale = source.read_stored(name).values()
        expected = decoded(codes, scale)
        assert torch.equal(source.read(name), expected), name
        assert torch.equal(source.read(name, (17, 97)), expected[17:97]), name
    source.close()
