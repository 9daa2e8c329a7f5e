"""What the package compressed-tensors decodes, packs and says in its presets, against ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from safetensors.torch import load_file, save_file

from quantkit.errors import SourceError
from quantkit.formats.bundle import write_config
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.layouts.compressed_tensors_config import quantization_config
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import (
    Float8Scheme,
    IntScheme,
    Mxfp4Scheme,
    Mxfp8Scheme,
    Nvfp4Scheme,
    Scheme,
    W4AFp8Scheme,
)
from quantkit.tensors import TensorInfo
from tests.formats.test_compressed_tensors import (
    CONFIG,
    INT4,
    with_config,
    write_all,
)


def compress_args(planned: list[PlannedTensor]) -> QuantizationConfig:
    """compressed-tensors' own reading of our section."""
    return QuantizationConfig.model_validate(quantization_config(planned))


ONE_OF_EACH: dict[str, Scheme] = {
    **{f"int{bits} g32": IntScheme(bits=bits, group_size=32) for bits in range(2, 9)},
    "int4 channel": IntScheme(group_size=None),
    "int4 asymmetric": IntScheme(symmetric=False),
    "int3 channel asymmetric": IntScheme(bits=3, group_size=None, symmetric=False),
    "int8 asymmetric": IntScheme(bits=8, symmetric=False, group_size=64),
    "int4 float16": IntScheme(scale_dtype="float16"),
    "int4 float32": IntScheme(scale_dtype="float32"),
    "fp8 block": Float8Scheme(),
    "nvfp4": Nvfp4Scheme(),
    "mxfp4": Mxfp4Scheme(),
    "mxfp8": Mxfp8Scheme(),
    "w4afp8": W4AFp8Scheme(),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compressed_tensors_decodes_exactly_what_we_mean(name: str, tmp_path: Path) -> None:
    scheme = ONE_OF_EACH[name]
    info = TensorInfo("a.layers.0.b.weight", (192, 256), "BF16")
    planned = [PlannedTensor(info, scheme, None)]
    weight = torch.randn(info.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized = write_all(
        tmp_path, planned, {info.name: weight}, negate=isinstance(scheme, IntScheme) and scheme.symmetric
    )
    state = {
        key.removeprefix("a.layers.0.b."): value for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    if not isinstance(scheme, Mxfp4Scheme | Mxfp8Scheme):  # decoded in the scale's dtype; float32 is exact
        state["weight_scale"] = state["weight_scale"].float()
    group = compress_args(planned).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat(group.format).value)
    weight = compressor.decompress(state, group)["weight"]
    expected = quantized[info.name].decode()
    whole = isinstance(scheme, IntScheme | Float8Scheme | W4AFp8Scheme)
    assert weight.dtype == (torch.float32 if whole else torch.bfloat16)
    assert torch.equal(weight, expected.to(weight.dtype))
    source = FolderSource(with_config(tmp_path, planned), COMPRESSED_TENSORS.reader)
    assert source.infos() == {info.name: TensorInfo(info.name, info.shape, "F32")}
    assert source.scheme(info.name) == scheme
    for rows in (None, (0, 192), (0, 1), (31, 33), (127, 130), (64, 128), (191, 192), (5, 5)):
        assert torch.equal(source.read(info.name, rows), expected if rows is None else expected[slice(*rows)])
    assert torch.equal(source.read_rows(info.name, [7, 3, 7]), expected[[7, 3, 7]])
    assert torch.equal(torch.cat(list(source.chunks(info.name, 50_000))), expected)


@pytest.mark.parametrize("scheme", [Nvfp4Scheme(), Mxfp4Scheme(), Mxfp8Scheme(), W4AFp8Scheme()], ids=str)
def test_compressed_tensors_packs_the_same_bytes(
    scheme: Nvfp4Scheme | Mxfp4Scheme | Mxfp8Scheme | W4AFp8Scheme, tmp_path: Path
) -> None:
    """What it makes of our decoded weight and our scales. Our zeros have no sign."""
    info = TensorInfo("a.layers.0.b.weight", (192, 256), "BF16")
    planned = [PlannedTensor(info, scheme, None)]
    weight = torch.randn(info.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    tensor = write_all(tmp_path, planned, {info.name: weight})[info.name]
    stored = {k.removeprefix("a.layers.0.b."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    group = compress_args(planned).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat(group.format).value)
    scale = stored["weight_scale"]
    powers = torch.exp2(scale.float() - 127)
    given_scale = powers if scale.dtype == torch.uint8 else scale if isinstance(scheme, W4AFp8Scheme) else scale.float()
    given = {**stored, "weight": tensor.decode() + 0.0, "weight_scale": given_scale}
    given.pop("weight_packed", None)
    given.pop("weight_shape", None)
    packed = compressor.compress(given, group)
    assert {name: (value.dtype, value.shape) for name, value in packed.items()} == {
        name: (value.dtype, value.shape) for name, value in stored.items()
    }
    for name, value in stored.items():
        assert torch.equal(packed[name].view(torch.uint8), value.view(torch.uint8)), name


def test_mxfp8_rounded_to_nearest_is_what_compressed_tensors_writes() -> None:
    """Scales of its own, codes and bytes, of a group of zeros and of groups whose largest weight is at the edge."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16().float() * 0.02
    weight[:2, 0] = torch.tensor([448.0, 447.9]) * 2**-6
    scheme = preset_name_to_scheme("MXFP8", ["Linear"])
    exponents = generate_mx_scales(weight.view(64, 4, 32).abs().amax(-1), num_bits=8)
    compressor = BaseCompressor.get_value_from_registry("mxfp8-quantized")
    theirs = compressor.compress({"weight": weight, "weight_scale": torch.exp2(exponents - 127)}, scheme)
    ours = Mxfp8Scheme().rounded(weight.unsqueeze(0), None, points=0, signed=True)
    assert torch.equal(theirs["weight"].view(torch.uint8), ours["codes"][0])
    assert torch.equal(theirs["weight_scale"], ours["scale"][0])


@pytest.mark.parametrize(("name", "scheme"), [("MXFP8", Mxfp8Scheme()), ("W4AFP8", W4AFp8Scheme())])
def test_the_config_says_what_the_preset_says(name: str, scheme: Scheme) -> None:
    planned = [PlannedTensor(TensorInfo("a.weight", (128, 128), "BF16"), scheme, None)]
    ours, theirs = compress_args(planned).config_groups["group_0"], preset_name_to_scheme(name, ["Linear"])
    for found, wanted in ((ours.weights, theirs.weights), (ours.input_activations, theirs.input_activations)):
        assert found is not None
        assert wanted is not None
        for key in ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "scale_dtype"):
            assert getattr(found, key) == getattr(wanted, key), key


@pytest.mark.parametrize("name", ["mxfp8", "w4afp8"])
def test_what_the_config_says_of_inputs_decides_the_scheme(name: str, tmp_path: Path) -> None:
    """Without inputs, MXFP8 is the same weights, and int4 is int4."""
    planned = [PlannedTensor(TensorInfo("a.weight", (128, 128), "BF16"), ONE_OF_EACH[name], None)]
    write_all(tmp_path, planned, {"a.weight": torch.randn(128, 128)})
    section = quantization_config(planned)
    groups = section["config_groups"]
    assert isinstance(groups, dict)
    groups["group_0"]["input_activations"] = None
    write_config(tmp_path, CONFIG, section)
    found = FolderSource(tmp_path, COMPRESSED_TENSORS.reader).scheme("a.weight")
    assert found == (Mxfp8Scheme() if name == "mxfp8" else INT4)


def test_mxfp8_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    planned = [PlannedTensor(TensorInfo("a.weight", (8, 128), "BF16"), Mxfp8Scheme(), None)]
    write_all(tmp_path, planned, {"a.weight": torch.randn(8, 128)})
    stored = load_file(tmp_path / "model.safetensors")
    save_file(
        {**stored, "a.weight_scale": stored["a.weight_scale"][:, :2].contiguous()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(SourceError, match=r"a\.weight: weight_scale is U8 \[8, 2\], which does not fit \[8, 128\]"):
        FolderSource(with_config(tmp_path, planned), COMPRESSED_TENSORS.reader)
