# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Codes into the bit planes of ggml's blocks on a GPU, a byte to a thread. See `quantkit.schemes.ggml.layout.Plane`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

_BYTES = 1024  # of a program


@triton.jit
def _write(
    numbers, blocks, n_bytes, count, block_bytes,
    START: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, SHIFT: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """numbers (n, count) into bytes [START, START + WIDTH) of blocks (n, block_bytes); n_bytes = n * WIDTH."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < n_bytes
    block, byte = place // WIDTH, place % WIDTH
    parts: tl.constexpr = 8 // BITS
    numbers += block * count + byte // RUN * (RUN * parts) + byte % RUN
    packed = tl.zeros([SIZE], tl.int32)
    for part in tl.static_range(parts):
        number = tl.load(numbers + part * RUN, mask=inside, other=0).to(tl.int32)
        packed |= ((number >> SHIFT) & ((1 << BITS) - 1)) << (part * BITS)
    tl.store(blocks + block * block_bytes + START + byte, packed.to(tl.uint8), mask=inside)


def write_plane(numbers: Tensor, blocks: Tensor, *, start: int, nbytes: int, bits: int, run: int, shift: int) -> None:
    """One plane of numbers (n, count) uint8 into blocks (n, block bytes) uint8, both contiguous."""
    n_bytes = len(blocks) * nbytes
    if n_bytes:
        with device_of(blocks):
            _write[(triton.cdiv(n_bytes, _BYTES),)](
                numbers, blocks, n_bytes, numbers.shape[1], blocks.shape[1],
                START=start, WIDTH=nbytes, BITS=bits, RUN=run, SHIFT=shift, SIZE=_BYTES, num_warps=4,
            )  # fmt: skip
