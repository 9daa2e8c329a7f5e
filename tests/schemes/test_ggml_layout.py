"""Bytes of ggml's block types: decoded to the bit as ggml's C code and gguf-py do, packed so that these two read what
was meant."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.schemes.ggml import layout as ggml_layout
from quantkit.schemes.ggml.layout import decode, pack, unpack
from quantkit.schemes.ggml.types import BLOCK_TYPES, BlockParams, BlockType
from tests.oracles import ggml

KINDS = [kind for kind in BLOCK_TYPES.values() if kind.levels]
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "Q2_0": (0,),
}  # fmt: skip
"""Bytes of a block where a float16 starts (ggml-common.h)."""

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_blocks(kind: BlockType, *lead: int, row_blocks: int = 3, seed: int = 0) -> Tensor:
    """Any bytes but for the scales, which are finite."""
    shape = (*lead, row_blocks, kind.nbytes)
    blocks = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    for start in HALVES[kind.name]:
        high = blocks[..., start + 1]
        blocks[..., start + 1] = torch.where(high & 0x7C == 0x7C, high ^ 0x40, high)
    return blocks.flatten(-2)


def rows_of_many_kinds(in_features: int) -> Tensor:
    """Normal, heavy-tailed, constant, zero and subnormal rows, and rows whose scale is a subnormal float16."""
    normal = torch.randn(4, in_features, generator=generator())
    heavy = torch.randn(4, in_features, generator=generator(1)) / torch.rand(4, in_features, generator=generator(2))
    constant = torch.tensor([1.0, -1.0, 0.02, -3e4, 0.0, -0.0])[:, None].expand(-1, in_features)
    tiny = normal[:3] * torch.tensor([1e-39, 1e-6, 3e-5])[:, None]
    return torch.cat((normal, heavy, constant, tiny))


def by_gguf(kind: BlockType, blocks: Tensor) -> Tensor:
    """Of types that gguf-py does not know, our own: for them ggml alone is asked."""
    if kind.name in ggml.NEWER:
        return decode(kind, blocks)
    with np.errstate(all="ignore"):
        weight = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.id))
    return torch.from_numpy(weight)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """As numbers, and the sign of each zero."""
    assert ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def random_params(kind: BlockType, rows: int, row_blocks: int) -> BlockParams:
    """Scales of many sizes, and every sub-scale that can be stored."""
    d = torch.randn(rows, row_blocks, generator=generator(3)).half().float()
    if kind.name == "MXFP4":
        d = 2.0 ** torch.randint(-126, 100, (rows, row_blocks), generator=generator(3))
    dmin = torch.randn(rows, row_blocks, generator=generator(4)).half().float() if kind.offset else None

    def integers(limits: tuple[int, int] | None) -> Tensor | None:
        if limits is None:
            return None
        shape = (rows, row_blocks * kind.groups)
        return torch.randint(limits[0], limits[1] + 1, shape, generator=generator(5), dtype=torch.int16)

    return BlockParams(d, dmin, integers(kind.sub_scale), integers(kind.sub_min))


def random_codes(kind: BlockType, rows: int, row_blocks: int) -> Tensor:
    shape = (rows, row_blocks * kind.block)
    return torch.randint(0, len(kind.levels), shape, generator=generator(6), dtype=torch.uint8)


def value(kind: BlockType, codes: Tensor, params: BlockParams) -> Tensor:
    """scale * level + offset, as `ggml_types` states it."""
    levels = torch.tensor(kind.levels, dtype=torch.float32)[codes.long()].unflatten(-1, (-1, kind.group))
    weight = params.scale().unsqueeze(-1) * levels
    offset = params.offset()
    return (weight if offset is None else weight + offset.unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_ids_and_sizes_are_those_of_ggml(kind: BlockType) -> None:
    if kind.name not in ggml.NEWER:
        assert gguf.GGMLQuantizationType[kind.name].value == kind.id
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.id)] == (kind.block, kind.nbytes)
    assert ggml.type_sizes(kind.id) == (kind.block, kind.nbytes)
    assert kind.block % kind.group == 0


def test_every_type_without_codebook_has_a_layout() -> None:
    assert set(ggml_layout.LAYOUTS) == {kind.name for kind in KINDS}


@every_kind
def test_no_bit_is_unused_or_used_twice(kind: BlockType) -> None:
    """Each flipped bit shows in the codes or the scales, and in one member of them alone."""
    blank = torch.zeros(1, kind.nbytes, dtype=torch.uint8)
    flipped = blank.repeat(8 * kind.nbytes, 1)
    for bit in range(8 * kind.nbytes):
        flipped[bit, bit // 8] = 1 << bit % 8
    codes, params = unpack(kind, flipped)
    codes_0, params_0 = unpack(kind, blank)
    members = ((params.d, params_0.d), (params.dmin, params_0.dmin), (params.sub_scale, params_0.sub_scale))
    pairs = [(codes, codes_0), *members, (params.sub_min, params_0.sub_min)]
    changed = sum(
        (ours.float().ne(theirs.float()) | (ours.float().signbit() != theirs.float().signbit())).sum(1)
        for ours, theirs in pairs
        if ours is not None and theirs is not None
    )
    assert torch.equal(torch.as_tensor(changed), torch.ones(8 * kind.nbytes, dtype=torch.int64))


@every_kind
@pytest.mark.parametrize("weighted", [False, True])
def test_decode_of_real_rows_equals_ggml_and_gguf(kind: BlockType, weighted: bool) -> None:
    in_features = 3 * 256
    importance = torch.rand(in_features, generator=generator(7)) + 0.1 if weighted else None
    blocks = ggml.quantize(kind.name, rows_of_many_kinds(in_features), importance)
    weight = decode(kind, blocks)
    assert_same_bits(weight, ggml.dequantize(kind.name, blocks))
    assert_same_bits(weight, by_gguf(kind, blocks))
    assert torch.equal(pack(kind, *unpack(kind, blocks)), blocks)


@every_kind
def test_decode_of_any_bytes_equals_ggml_and_gguf(kind: BlockType) -> None:
    blocks = random_blocks(kind, 400)
    weight = decode(kind, blocks)
    assert ggml.is_valid(kind.name, blocks) or kind.name == "MXFP4"
    assert_same_bits(weight, ggml.dequantize(kind.name, blocks))
    assert_same_bits(weight, by_gguf(kind, blocks))


@every_kind
def test_blocks_survive_unpack_and_pack(kind: BlockType) -> None:
    blocks = random_blocks(kind, 400)
    codes, params = unpack(kind, blocks)
    assert codes.shape == (400, 3 * kind.block)
    assert codes.dtype == torch.uint8
    assert params.d.shape == (400, 3)
    for sub in (params.sub_scale, params.sub_min):
        assert sub is None or (sub.shape == (400, 3 * kind.groups) and sub.dtype == torch.int16)
    assert torch.equal(pack(kind, codes, params), blocks)
    assert_same_bits(decode(kind, blocks), value(kind, codes, params))


@every_kind
def test_ggml_reads_what_was_packed(kind: BlockType) -> None:
    codes, params = random_codes(kind, 50, 2), random_params(kind, 50, 2)
    blocks = pack(kind, codes, params)
    assert blocks.shape == (50, kind.row_bytes(codes.shape[1]))
    assert ggml.is_valid(kind.name, blocks)
    assert_same_bits(ggml.dequantize(kind.name, blocks), value(kind, codes, params))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q2_K", "Q6_K"])
def test_every_finite_float16_as_scale(name: str) -> None:
    kind = BLOCK_TYPES[name]
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.float16)
    halves = halves[halves.isfinite()]
    blocks = random_blocks(kind, len(halves), row_blocks=1)
    for start in HALVES[name]:
        blocks[:, start : start + 2] = halves.view(torch.uint8).view(-1, 2)
    assert_same_bits(decode(kind, blocks), ggml.dequantize(name, blocks))
    codes, params = unpack(kind, blocks)
    assert torch.equal(pack(kind, codes, params), blocks)


def test_every_exponent_of_mxfp4() -> None:
    """ggml knows no NaN in E8M0: code 255 is 2**127, where some weights overflow to infinity."""
    kind = BLOCK_TYPES["MXFP4"]
    blocks = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 17)
    blocks[:, 1:] = torch.arange(16, dtype=torch.uint8) * 17
    weight = decode(kind, blocks)
    assert_same_bits(weight, ggml.dequantize("MXFP4", blocks))
    assert_same_bits(weight, by_gguf(kind, blocks))
    codes, params = unpack(kind, blocks)
    assert params.d[:3, 0].tolist() == [2.0**-128, 2.0**-127, 2.0**-126]
    assert params.d[-1] == 2.0**127
    assert torch.equal(pack(kind, codes, params), blocks)


@every_kind
def test_leading_dimensions_and_slices(kind: BlockType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_layout, "CPU_SLICE", 5 * kind.block)
    blocks = random_blocks(kind, 2, 3, 4)
    codes, params = unpack(kind, blocks)
    assert codes.shape == (2, 3, 4, 3 * kind.block)
    assert params.d.shape == (2, 3, 4, 3)
    assert params.scale().shape == (2, 3, 4, 3 * kind.groups)
    assert torch.equal(pack(kind, codes, params), blocks)
    weight = decode(kind, blocks)
    assert_same_bits(weight, ggml.dequantize(kind.name, blocks))
    # A view that is not contiguous, and one matrix of the batch.
    assert_same_bits(decode(kind, blocks.transpose(0, 1)), weight.transpose(0, 1).contiguous())
    assert_same_bits(decode(kind, blocks[1, 2]), weight[1, 2])
    assert_same_bits(decode(kind, blocks[0, 0, :, kind.nbytes :]), weight[0, 0, :, kind.block :].contiguous())


@every_kind
def test_one_block_and_no_rows(kind: BlockType) -> None:
    one = random_blocks(kind, 1, row_blocks=1)
    assert_same_bits(decode(kind, one), ggml.dequantize(kind.name, one))
    assert torch.equal(pack(kind, *unpack(kind, one)), one)
    none = torch.zeros(0, 2 * kind.nbytes, dtype=torch.uint8)
    assert decode(kind, none).shape == (0, 2 * kind.block)
    codes, params = unpack(kind, none)
    assert codes.shape == (0, 2 * kind.block)
    assert pack(kind, codes, params).shape == none.shape


@every_kind
def test_scales_may_lie_in_memory_as_they_like(kind: BlockType) -> None:
    """A single column counts as contiguous whatever its strides."""
    blocks = random_blocks(kind, 5, row_blocks=1)
    codes, params = unpack(kind, blocks)
    column = params.d.contiguous().as_strided((5, 1), (1, 5))
    assert torch.equal(pack(kind, codes, replace(params, d=column)), pack(kind, codes, params))


@every_kind
def test_pack_rounds_nothing(kind: BlockType) -> None:
    codes, params = random_codes(kind, 2, 1), random_params(kind, 2, 1)
    for wrong in (0.3, float("nan"), 1e30 if kind.name != "MXFP4" else 0.0, float("inf")):
        with pytest.raises(AssertionError, match="a scale is not"):
            pack(kind, codes, replace(params, d=torch.full_like(params.d, wrong)))
    if len(kind.levels) < 256:
        with pytest.raises(AssertionError, match=f"code {len(kind.levels)} in {kind.name}"):
            pack(kind, torch.full_like(codes, len(kind.levels)), params)
    if params.sub_scale is not None and kind.sub_scale is not None:
        with pytest.raises(AssertionError, match="do not fit"):
            pack(kind, codes, replace(params, sub_scale=torch.full_like(params.sub_scale, kind.sub_scale[1] + 1)))
    missing = replace(params, dmin=params.d if params.dmin is None else None)
    with pytest.raises(AssertionError, match=f"not the scales of {kind.name}"):
        pack(kind, codes, missing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_on_a_gpu(kind: BlockType) -> None:
    blocks = random_blocks(kind, 400)
    weight = decode(kind, blocks.cuda())
    assert_same_bits(weight.cpu(), decode(kind, blocks))
    codes, params = unpack(kind, blocks.cuda())
    assert torch.equal(codes.cpu(), unpack(kind, blocks)[0])
    assert torch.equal(pack(kind, codes, params).cpu(), blocks)
