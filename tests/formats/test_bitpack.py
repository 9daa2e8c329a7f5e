"""Packed words are those of compressed-tensors, for every width and any number of columns."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.formats.bitpack import n_words, pack, unpack


def random_codes(rows: int, n_codes: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n_codes), generator=generator, dtype=torch.uint8)


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


@settings(deadline=None, max_examples=150)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), n_codes=st.integers(1, 140), seed=st.integers(0, 2**32))
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, n_codes: int, seed: int) -> None:
    codes = random_codes(rows, n_codes, bits, seed)
    words = pack(codes, bits)
    theirs = pack_to_int32(signed(codes, bits), bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, n_words(n_codes, bits))
    assert torch.equal(words, theirs)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed(codes, bits))
    assert torch.equal(unpack(words, bits, n_codes), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_along_the_first_dimension(bits: int) -> None:
    zero_point = random_codes(96, 3, bits, seed=0)
    theirs = pack_to_int32(signed(zero_point, bits), bits, packed_dim=0)
    assert torch.equal(pack(zero_point.T.contiguous(), bits).T, theirs)
    assert torch.equal(pack(zero_point[:, :1].T.contiguous(), bits).T, theirs[:, :1])
    assert torch.equal(unpack(theirs[:, :1].T, bits, 96).T, zero_point[:, :1])


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_row_does_not_leak_into_the_next(bits: int) -> None:
    codes = random_codes(7, 33, bits, seed=1)
    assert torch.equal(pack(codes, bits)[3:5], pack(codes[3:5], bits))


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_rows(bits: int) -> None:
    words = pack(torch.zeros(0, 40, dtype=torch.uint8), bits)
    assert words.shape == (0, n_words(40, bits))
    assert unpack(words, bits, 40).shape == (0, 40)


def test_bit_order_by_hand() -> None:
    assert pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4).tolist() == [
        [-2023406815]
    ]  # 0x87654321
    # 3 bits: 7, then zeros, then code 10 (bits 30, 31 and bit 0 of the next word)
    codes = torch.zeros(1, 11, dtype=torch.uint8)
    codes[0, 0] = codes[0, 10] = 7
    assert pack(codes, 3).tolist() == [[-(2**30) + 7, 1]]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_may_lie_anywhere_and_stay(bits: int) -> None:
    """A slice whose first byte is no multiple of a word's; the words share no memory with it."""
    base = random_codes(1, 33, bits, seed=1).flatten()
    codes = base[1:].view(2, 16)
    words, kept = pack(codes, bits), codes.clone()
    codes.zero_()
    assert torch.equal(unpack(words, bits, 16), kept)
