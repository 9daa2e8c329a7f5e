"""Blocks of the types with a codebook <-> their numbers, by `codebook_types.Bits`.

Blocks (..., out, row bytes) uint8 enter or leave. One pair of functions serves all types.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.schemes.ggml.codebook_types import CODEBOOKS, Bits, all_signs
from quantkit.schemes.ggml.types import BlockType

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class CodebookParts:
    """Blocks taken apart. d (..., out, blocks) float16; sub (..., out, groups) uint8: m; codes (..., out, in / width)
    int16; signs (..., out, in / 8) uint8: bit i set where weight i of 8 is negative, zeros where codewords have
    signs."""

    d: Tensor
    sub: Tensor
    codes: Tensor
    signs: Tensor

    def scale(self, kind: BlockType) -> Tensor:
        """Scale of each group, (..., out, groups) float32; exact."""
        step = self.d.float() * CODEBOOKS[kind.name].unit
        return step.repeat_interleave(kind.groups, -1) * (2 * self.sub.float() + 1)


def unpack(kind: BlockType, blocks: Tensor) -> CodebookParts:
    """Take blocks (..., out, row bytes) uint8 apart."""
    book = CODEBOOKS[kind.name]
    block = blocks.reshape(*blocks.shape[:-1], -1, kind.nbytes)
    numbers: dict[str, Tensor] = {}
    for bits in book.layout:
        read = _read(block, bits)
        numbers[bits.of] = numbers[bits.of] | read if bits.of in numbers else read
    d = numbers["d"].to(torch.int16).view(torch.float16)
    if book.signs == "none":
        signs = blocks.new_zeros(*d.shape[:-1], kind.block // 8)
    else:
        signs = all_signs(blocks.device)[numbers["signs"]] if book.signs == "even" else numbers["signs"]
    parts = d, numbers["sub"].to(torch.uint8), numbers["codes"].short(), signs.to(torch.uint8)
    return CodebookParts(*(part.flatten(-2) for part in parts))


def pack(kind: BlockType, parts: CodebookParts) -> Tensor:
    """Blocks (..., out, row bytes) uint8 of parts, the opposite of `unpack`. Where signs are "even" the eighth is not
    stored: it must make their number even."""
    shape = (*parts.d.shape, -1)
    numbers = {
        "d": parts.d.contiguous().view(torch.int16).unsqueeze(-1),
        "sub": parts.sub.reshape(shape),
        "codes": parts.codes.reshape(shape),
        "signs": parts.signs.reshape(shape),
    }
    block = torch.zeros(*parts.d.shape, kind.nbytes, dtype=torch.uint8, device=parts.d.device)
    for bits in CODEBOOKS[kind.name].layout:
        block[..., bits.start : bits.start + bits.word * bits.count] |= _written(numbers[bits.of], bits)
    return block.flatten(-2)


def _shifts(bits: Bits, device: torch.device) -> Tensor:
    return bits.at + bits.bits * torch.arange(bits.each, device=device)


def _read(block: Tensor, bits: Bits) -> Tensor:
    """block (..., nbytes) uint8 -> (..., numbers) int64."""
    stored = block[..., bits.start : bits.start + bits.word * bits.count].contiguous()
    words = stored.view(_WORDS[bits.word]).long().unsqueeze(-1)
    numbers = (words >> _shifts(bits, block.device) & (1 << bits.bits) - 1).flatten(-2)
    return numbers.repeat_interleave(bits.spread, -1) << bits.shift


def _written(numbers: Tensor, bits: Bits) -> Tensor:
    """The opposite of `_read`: (..., numbers) -> bytes (..., word * count) uint8, other bits zero."""
    own = numbers[..., :: bits.spread].long() >> bits.shift & (1 << bits.bits) - 1
    words = (own.unflatten(-1, (bits.count, bits.each)) << _shifts(bits, numbers.device)).sum(-1)
    return words.contiguous().view(torch.uint8).unflatten(-1, (bits.count, 8))[..., : bits.word].flatten(-2)
