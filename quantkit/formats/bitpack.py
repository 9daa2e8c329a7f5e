"""Codes of 2 to 8 bits <-> int32 words, as compressed-tensors stores them: one dense little-endian stream of bits for each row.

Code ``i`` of a row occupies the bits ``[i * bits, (i + 1) * bits)`` of the row's stream; bit ``b`` of the stream is bit ``b % 32``
of word ``b // 32``. A row is padded with zero bits to a whole number of words. Codes of 3, 5, 6 and 7 bits straddle words.
With 4 bits this is the well-known "eight nibbles to a word, lowest first".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32
CODES_PER_UNIT = 8  # eight codes of b bits are exactly b bytes: the unit in which odd widths are packed


def n_words(n_codes: int, bits: int) -> int:
    """Words of one packed row of ``n_codes`` codes."""
    return math.ceil(n_codes * bits / WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (rows, n) uint8, each < 2**bits -> words (rows, n_words(n, bits)) int32, contiguous, on the same device."""
    import torch
    from torch.nn.functional import pad

    assert codes.dtype == torch.uint8 and codes.ndim == 2, f"codes are {codes.dtype} with {codes.ndim} dimensions"
    rows, n_codes = codes.shape
    codes = pad(codes, (0, -n_codes % CODES_PER_UNIT))
    stream = codes if bits == 8 else _pack_in_bytes(codes, bits) if bits in (2, 4) else _pack_straddling(codes, bits)
    # The padding to whole units may be longer or shorter than that to whole words; both are zeros.
    stream = pad(stream, (0, 4 * n_words(n_codes, bits) - stream.shape[1]))
    return stream.reshape(-1).view(torch.int32).view(rows, -1)


def unpack(words: Tensor, bits: int, n_codes: int) -> Tensor:
    """words (rows, n_words(n_codes, bits)) int32 -> codes (rows, n_codes) uint8."""
    import torch
    from torch.nn.functional import pad

    assert words.dtype == torch.int32 and words.ndim == 2, f"words are {words.dtype} with {words.ndim} dimensions"
    assert words.shape[1] == n_words(n_codes, bits), f"{words.shape[1]} words cannot be {n_codes} codes of {bits} bits"
    rows = words.shape[0]
    stream = words.contiguous().view(torch.uint8).view(rows, -1)
    if bits == 8:
        return stream[:, :n_codes].contiguous()
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = (stream[:, :, None] >> shifts) & (2**bits - 1)
        return codes.view(rows, -1)[:, :n_codes].contiguous()
    units = math.ceil(n_codes / CODES_PER_UNIT)
    stream = pad(stream, (0, units * bits - stream.shape[1]))
    unit = torch.zeros(rows, units, dtype=torch.int64, device=words.device)
    for index, byte in enumerate(stream.view(rows, units, bits).unbind(-1)):
        unit |= byte.long() << (8 * index)
    shifts = torch.arange(0, CODES_PER_UNIT * bits, bits, dtype=torch.int64, device=words.device)
    codes = (unit[:, :, None] >> shifts) & (2**bits - 1)
    return codes.view(rows, -1)[:, :n_codes].to(torch.uint8)


def _pack_in_bytes(codes: Tensor, bits: int) -> Tensor:
    """Widths that divide a byte: codes (rows, n) uint8 -> stream (rows, n * bits / 8) uint8, without leaving 8-bit arithmetic."""
    per_byte = 8 // bits
    stream = codes[:, ::per_byte].clone()
    for index in range(1, per_byte):
        stream |= codes[:, index::per_byte] << (bits * index)
    return stream


def _pack_straddling(codes: Tensor, bits: int) -> Tensor:
    """Other widths: eight codes form one number of 8 * bits <= 56 bits, whose low bytes are the stream."""
    import torch

    rows, n_codes = codes.shape
    units = codes.view(rows, -1, CODES_PER_UNIT)
    unit = torch.zeros(rows, n_codes // CODES_PER_UNIT, dtype=torch.int64, device=codes.device)
    for index in range(CODES_PER_UNIT):
        unit |= units[:, :, index].long() << (bits * index)
    return unit.view(torch.uint8).view(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
