"""Types with a codebook: decoded as ggml's C code and gguf-py do; encoded with no more error than by ggml."""

from __future__ import annotations

import itertools

import gguf
import pytest
import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.schemes.ggml.codebook import decode_codebook, decode_parts, encode_fixed, quantize_codebook
from quantkit.schemes.ggml.codebook_layout import pack, unpack
from quantkit.schemes.ggml.codebook_types import CODEBOOKS, codewords
from quantkit.schemes.ggml.types import BLOCK_TYPES, BlockType
from tests.oracles import ggml
from tests.schemes import test_ggml_fit

KINDS = [BLOCK_TYPES[name] for name in CODEBOOKS]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
IN_FEATURES = 512


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def random_blocks(kind: BlockType, *lead: int) -> Tensor:
    """Any bytes, but d is finite."""
    blocks = torch.randint(0, 256, (*lead, 3, kind.nbytes), generator=generator(), dtype=torch.uint8)
    # IQ1_M keeps the bits of d at the ends of four words.
    blocks[..., 55 if kind.name == "IQ1_M" else 1] &= 0xBF
    return blocks.flatten(-2)


def some_importance(kind: str) -> Tensor | None:
    """Of the inputs: unequal, with dead inputs (and a dead block), with one that outweighs all others, or none."""
    importance = normal(IN_FEATURES, seed=7).exp()
    if kind == "dead":
        importance[::3] = 0
        importance[256:] = 0
    if kind == "outlier":
        importance[40] = 1e7
    return None if kind == "none" else importance


def many_rows() -> dict[str, Tensor]:
    rows = 5
    plain, steep = normal(rows, IN_FEATURES), normal(rows, IN_FEATURES // 32, seed=2).mul(2).exp()
    ramp = torch.rand(rows, IN_FEATURES, generator=generator(4)) + 0.01
    return {
        "normal": plain * 0.02,
        "heavy": plain / torch.rand(rows, IN_FEATURES, generator=generator(1)),
        "groups": plain * steep.repeat_interleave(32, -1),
        "channels": plain * normal(IN_FEATURES, seed=3).exp(),
        "sparse": plain * (ramp < 0.06),
        "one": plain * (torch.arange(IN_FEATURES) % 256 == 7),
        "positive": ramp,
        "negative": -ramp,
        "constant": torch.tensor([1.0, -1.0, 0.02, -3e4, 7e-4])[:, None].expand(-1, IN_FEATURES),
        "signs": plain.sign(),
        "zero": torch.zeros(rows, IN_FEATURES),
        "half zero": plain * (torch.arange(IN_FEATURES) % 64 < 32),
        "large": plain * 2e5,
        "d is subnormal": plain * torch.tensor([1e-4, 3e-5, 1e-5, 3e-6, 1e-6])[:, None],
        "d underflows": plain * 1e-9,
        "subnormal": plain * 1e-40,
    }


def weighted_error(weight: Tensor, decoded: Tensor, importance: Tensor | None) -> float:
    squares = (weight.double() - decoded.double()).square()
    return float((squares if importance is None else squares * importance.double()).sum())


def by_ggml(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """What ggml makes of the weight; of most types only with some importance."""
    if importance is None and ggml.needs_importance(kind.name):
        importance = torch.ones(weight.shape[-1])
    return ggml.dequantize(kind.name, ggml.quantize(kind.name, weight, importance))


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """As numbers, and the sign of each zero."""
    assert ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def assert_decoded_as_by_others(kind: BlockType, blocks: Tensor) -> None:
    decoded = decode_codebook(kind, blocks)
    assert_same_bits(decoded, ggml.dequantize(kind.name, blocks))
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.id))
    assert torch.equal(decoded, torch.from_numpy(theirs))


@every_kind
def test_any_bytes_decode_as_ggml_and_gguf_do(kind: BlockType) -> None:
    assert_decoded_as_by_others(kind, random_blocks(kind, 2, 7))


@every_kind
def test_slices_of_rows_decode_as_one(kind: BlockType, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(kind, 2, 7)
    whole = decode_codebook(kind, blocks)
    monkeypatch.setattr("quantkit.schemes.ggml.codebook.SLICE_BYTES", 30_000)
    assert_same_bits(decode_codebook(kind, blocks), whole)


@every_kind
def test_parts_pack_to_the_bytes_they_came_from(kind: BlockType) -> None:
    blocks = random_blocks(kind, 2, 7)
    assert torch.equal(pack(kind, unpack(kind, blocks)), blocks)


@every_kind
@pytest.mark.parametrize("importance", ["none", "unequal", "dead", "outlier"])
def test_error_is_at_most_that_of_ggml(kind: BlockType, importance: str) -> None:
    weights = many_rows()
    share = some_importance(importance)
    blocks = quantize_codebook(kind, torch.stack(list(weights.values())), share)
    assert ggml.is_valid(kind.name, blocks)
    assert_decoded_as_by_others(kind, blocks)
    for (name, weight), encoded in zip(weights.items(), blocks, strict=True):
        ours = weighted_error(weight, decode_codebook(kind, encoded), share)
        theirs = weighted_error(weight, by_ggml(kind, weight, share), share)
        assert ours <= theirs, f"{name}: {ours / theirs:.4f} of ggml's"


@every_kind
@pytest.mark.parametrize("importance", test_ggml_fit.IMPORTANCES.values(), ids=test_ggml_fit.IMPORTANCES)
def test_error_is_at_most_that_of_ggml_on_other_types_matrices(kind: BlockType, importance: Tensor | None) -> None:
    for name, weight in test_ggml_fit.MATRICES.items():
        ours = weighted_error(weight, decode_codebook(kind, quantize_codebook(kind, weight, importance)), importance)
        assert ours <= weighted_error(weight, by_ggml(kind, weight, importance), importance), name


@every_kind
def test_a_normal_matrix_has_much_less_error_than_by_ggml(kind: BlockType) -> None:
    weight, importance = normal(32, IN_FEATURES), some_importance("unequal")
    ours = weighted_error(weight, decode_codebook(kind, quantize_codebook(kind, weight, importance)), importance)
    assert ours <= 0.9 * weighted_error(weight, by_ggml(kind, weight, importance), importance)


@every_kind
def test_codes_are_the_best_for_the_stored_scales(kind: BlockType) -> None:
    weight, importance = normal(16, IN_FEATURES), some_importance("unequal")
    assert importance is not None
    parts = unpack(kind, quantize_codebook(kind, weight, importance))
    found = weighted_error(weight, decode_parts(kind, parts), importance)
    scale = parts.scale(kind).repeat_interleave(kind.group // 8, -1)
    codes, signs = encode_fixed(kind, weight, scale, importance, parts.codes)
    best = type(parts)(parts.d, parts.sub, codes, signs)
    assert_decoded_as_by_others(kind, pack(kind, best))
    least = weighted_error(weight, decode_parts(kind, best), importance)
    # Of even signs, the search tries only some of the places for a wrong one.
    few_flips = CODEBOOKS[kind.name].signs == "even"
    assert least * (1 - 1e-6) <= found <= least * (1.002 if few_flips else 1 + 1e-6)


def allowed_signs(kind: BlockType) -> Tensor:
    """(n, 8) of 1 and -1."""
    if CODEBOOKS[kind.name].signs == "none":
        return torch.ones(1, 8)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)))
    return signs if CODEBOOKS[kind.name].signs == "free" else signs[signs.prod(-1) > 0]


@every_kind
def test_eight_weights_on_a_fixed_scale_are_encoded_as_by_trying_everything(kind: BlockType) -> None:
    weight, importance = normal(12, 8), torch.rand(12, 8, generator=generator(9))
    scale = torch.full((12, 1), 2.0 / float(codewords(kind.name).max()))
    grid, width = codewords(kind.name).double(), CODEBOOKS[kind.name].width
    before = torch.zeros(12, 8 // width, dtype=torch.int16)
    if CODEBOOKS[kind.name].shared > 8:  # in the first rows shifts are up, in the others down
        before[6:] = len(grid) // 2
    codes, signs = encode_fixed(kind, weight, scale, importance, before)
    for row in range(12):
        candidates = grid if CODEBOOKS[kind.name].shared == 8 else grid.chunk(2)[row // 6]
        signed = (weight[row].double() * allowed_signs(kind).double()).view(-1, 8 // width, 1, width)
        squares = (signed - float(scale[row]) * candidates).square() * importance[row].double().view(-1, 1, width)
        least = float(squares.sum(-1).amin(-1).sum(-1).min())
        sign = 1 - 2 * (signs[row].int() >> torch.arange(8) & 1)
        assert (sign == allowed_signs(kind)).all(-1).any()
        decoded = grid[codes[row].long()].flatten() * sign * float(scale[row])
        assert weighted_error(weight[row], decoded, importance[row]) == pytest.approx(least, rel=1e-6)


@every_kind
def test_neither_threads_nor_company_change_bytes(kind: BlockType) -> None:
    weight, importance = normal(3, 37, 256), torch.rand(3, 256, generator=generator(5))
    threads = torch.get_num_threads()
    together = quantize_codebook(kind, weight, importance)
    try:
        torch.set_num_threads(3)
        assert torch.equal(quantize_codebook(kind, weight, importance), together)
    finally:
        torch.set_num_threads(threads)
    for matrix, share, blocks in zip(weight, importance, together, strict=True):
        assert torch.equal(quantize_codebook(kind, matrix, share), blocks)
    assert torch.equal(quantize_codebook(kind, weight[1, 30:31], importance[1]), together[1, 30:31])


@every_kind
def test_the_largest_weights_have_finite_scales(kind: BlockType) -> None:
    weight = normal(2, 256).clamp(-1, 1) * 0.95 * largest(kind)
    blocks = quantize_codebook(kind, weight, None)
    assert ggml.is_valid(kind.name, blocks)
    assert weighted_error(weight, decode_codebook(kind, blocks), None) < 0.35 * weighted_error(weight, weight * 0, None)


def largest(kind: BlockType) -> float:
    """The largest weight that a block holds."""
    book = CODEBOOKS[kind.name]
    return 65504 * book.unit * (2 * book.top + 1) * float(codewords(kind.name).max())


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 4e7])
def test_values_that_no_block_holds_are_refused_in_one_line(kind: BlockType, value: float) -> None:
    weight = normal(2, 3, 256)
    weight[1, 2, 100] = value
    with pytest.raises(SchemeError, match=r"row 2") as caught:
        quantize_codebook(kind, weight, None)
    assert "\n" not in str(caught.value)


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_importance_that_means_nothing_is_refused(kind: BlockType, value: float) -> None:
    importance = torch.ones(256)
    importance[3] = value
    with pytest.raises(SchemeError, match="importance"):
        quantize_codebook(kind, normal(1, 256), importance)


@every_kind
def test_rows_that_are_no_whole_blocks_are_refused(kind: BlockType) -> None:
    with pytest.raises(SchemeError, match="288"):
        quantize_codebook(kind, normal(1, 288), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_a_gpu_decodes_and_returns_the_same(kind: BlockType) -> None:
    blocks, weight = random_blocks(kind, 7), normal(7, IN_FEATURES)
    assert_same_bits(decode_codebook(kind, blocks.cuda()).cpu(), decode_codebook(kind, blocks))
    assert torch.equal(quantize_codebook(kind, weight.cuda(), None).cpu(), quantize_codebook(kind, weight, None))
