"""Codes of 2 to 8 bits <-> int32 words, as compressed-tensors stores them: one dense little-endian stream of bits for
each row.

Code ``i`` of a row occupies the bits ``[i * bits, (i + 1) * bits)`` of the row's stream; bit ``b`` of the stream is bit
``b % 32`` of word ``b // 32``. A row is padded with zero bits to a whole number of words. Codes of 3, 5, 6 and 7 bits
straddle words. With 4 bits this is the well-known "eight nibbles to a word, lowest first".

Eight codes are one *unit*: in memory eight bytes, packed ``bits`` bytes. Read as one 64-bit number, a unit is squeezed
in three steps (pairs of 8-bit lanes, of 16-bit lanes, of 32-bit lanes), whatever the width: few passes over an eighth
of the elements.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32
CODES_PER_UNIT = 8


def n_words(n_codes: int, bits: int) -> int:
    """Words of one packed row of ``n_codes`` codes."""
    return math.ceil(n_codes * bits / WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (rows, n) uint8, each < 2**bits -> words (rows, n_words(n, bits)) int32, contiguous, on the same device."""
    import torch
    from torch.nn.functional import pad

    assert (codes.dtype, codes.ndim) == (torch.uint8, 2), f"codes are {codes.dtype} with {codes.ndim} dimensions"
    rows, n_codes = codes.shape
    stream = (_padded if bits == 4 else pad)(codes, (0, -n_codes % CODES_PER_UNIT))
    if bits == 4:  # the common width by its short way, five times faster than three steps
        stream = stream[:, ::2] | stream[:, 1::2] << 4
    elif bits < 8:
        # Flat first: a single row or column may count as contiguous with strides that a wider view refuses.
        units = stream.contiguous().reshape(-1).view(torch.int64).view(rows, stream.shape[1] // CODES_PER_UNIT)
        for lane, filled in _lanes(bits):
            low, high = _masks(lane, filled)
            units = (units & low).bitwise_or_(units.bitwise_and(high).bitwise_right_shift_(lane - filled))
        stream = units.view(torch.uint8).view(*units.shape, 8)[:, :, :bits].reshape(rows, units.shape[1] * bits)
    # The padding to whole units may be longer or shorter than that to whole words; both are zeros.
    width = n_words(n_codes, bits)
    stream = _padded(stream, (0, 4 * width - stream.shape[1]))
    return stream.contiguous().reshape(-1).view(torch.int32).view(rows, width)


def _padded(stream: Tensor, missing: tuple[int, int]) -> Tensor:
    """As `pad`, which copies even where nothing is missing; this gives the stream itself."""
    from torch.nn.functional import pad

    return pad(stream, missing) if any(missing) else stream


def unpack(words: Tensor, bits: int, n_codes: int) -> Tensor:
    """words (rows, n_words(n_codes, bits)) int32 -> codes (rows, n_codes) uint8."""
    import torch
    from torch.nn.functional import pad

    assert (words.dtype, words.ndim) == (torch.int32, 2), f"words are {words.dtype} with {words.ndim} dimensions"
    assert words.shape[1] == n_words(n_codes, bits), f"{words.shape[1]} words cannot be {n_codes} codes of {bits} bits"
    rows = words.shape[0]
    stream = words.contiguous().reshape(-1).view(torch.uint8).view(rows, 4 * words.shape[1])
    if bits < 8:
        n_units = math.ceil(n_codes / CODES_PER_UNIT)
        stream = pad(stream, (0, n_units * bits - stream.shape[1]))
        units = pad(stream.reshape(rows, n_units, bits), (0, 8 - bits)).view(torch.int64).view(rows, n_units)
        for lane, filled in reversed(_lanes(bits)):
            low, high = _masks(lane, filled)
            units = (units & low).bitwise_or_(units.bitwise_left_shift(lane - filled).bitwise_and_(high))
        stream = units.view(torch.uint8)
    return stream[:, :n_codes].contiguous()


def _lanes(bits: int) -> list[tuple[int, int]]:
    """(width of a lane, bits in use at its low end) before each of the three steps."""
    return [(8 << step, bits << step) for step in range(3)]


def _masks(lane: int, filled: int) -> tuple[int, int]:
    """The bits in use of the even and of the odd lanes of a 64-bit unit. The top bit is never in use: no sign, shifts
    are plain."""
    even = sum(((1 << filled) - 1) << start for start in range(0, 64, 2 * lane))
    return even, even << lane
