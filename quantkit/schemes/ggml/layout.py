"""Codes and scales of ggml's block types <-> the bytes of a GGUF file, and bytes -> weights as llama.cpp computes them.

A matrix (out, in) is (out, row_bytes) bytes; a row is whole blocks, so in memory any batch of matrices is one long run
of blocks: here flat (n, nbytes). A block is described by *planes* (`Plane`): which bytes hold which bits of which
numbers. One pair of functions reads and writes planes; the scales of Q4_K and Q5_K alone need a pair of their own.

Facts: ggml/src/ggml-common.h (structs), dequantize_row_* and get_scale_min_k4 of ggml/src/ggml-quants.c, and
ggml_e8m0_to_fp32_half of ggml/src/ggml-impl.h in llama.cpp. Types with a codebook: `codebook_layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.backend import Backend
from quantkit.schemes.ggml.types import BlockParams, BlockType

CPU_SLICE = 1 << 20
"""Weights treated at a time: a slice stays in the caches through all its passes. Smaller ones were slower."""
DEVICE_SLICE = 1 << 24
"""Weights in a slice on an accelerator, where a pass must be long: 64 MiB of float32."""
WRITTEN_SLICE = 1 << 28
"""Weights in a slice where a kernel writes planes, without temporary copies: checks wait for the accelerator once a
slice."""
SIGN = 0x80
"""Turns a two's complement byte into an unsigned one, 128 higher."""
E8M0_BITS_0 = 0x00200000
"""Bits of 2**-128, the scale of E8M0 code 0; 2**-127 (code 1) is its double. Both are subnormal float32."""
MANTISSA_BITS = 23


@dataclass(frozen=True, slots=True)
class Plane:
    """``bits`` bits of each number, in bytes [start, start + nbytes) of a block.

    The bytes are cut into chunks of ``run``. A chunk holds 8 // bits parts of ``run`` numbers: bits
    [part * bits, part * bits + bits) of byte ``i`` belong to number ``chunk * run * parts + part * run + i`` and are
    its bits [shift, shift + bits).
    """

    start: int
    nbytes: int
    bits: int
    run: int
    shift: int = 0

    @property
    def parts(self) -> int:
        """Numbers that share a byte."""
        return 8 // self.bits

    @property
    def chunks(self) -> int:
        """Runs of bytes."""
        return self.nbytes // self.run

    @property
    def word(self) -> torch.dtype:
        """The widest integer whose lanes are bytes of one run: fewer elements for the same bytes."""
        return torch.int64 if self.run % 8 == 0 else torch.uint8


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a block keeps what. Lowest bits first in ``codes`` and ``fields``.

    d, dmin: byte of the float16 (MXFP4: of the E8M0). ``fields``: the sub_scale of all groups, then the sub_min of all
    groups, each less the lowest value of its type. ``six_bit``: byte of the 12 bytes of Q4_K and Q5_K instead.
    ``signed_codes``, ``signed_fields``: stored in two's complement.
    """

    codes: tuple[Plane, ...]
    d: int = 0
    dmin: int | None = None
    fields: tuple[Plane, ...] = ()
    six_bit: int | None = None
    signed_codes: bool = False
    signed_fields: bool = False


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout((Plane(2, 16, 4, 16),)),
    "Q4_1": Layout((Plane(4, 16, 4, 16),), dmin=2),
    "Q5_0": Layout((Plane(6, 16, 4, 16), Plane(2, 4, 1, 1, shift=4))),
    "Q5_1": Layout((Plane(8, 16, 4, 16), Plane(4, 4, 1, 1, shift=4)), dmin=2),
    "Q8_0": Layout((Plane(2, 32, 8, 32),), signed_codes=True),
    "Q2_K": Layout((Plane(16, 64, 2, 32),), d=80, dmin=82, fields=(Plane(0, 16, 4, 16),)),
    "Q3_K": Layout(
        (Plane(32, 64, 2, 32), Plane(0, 32, 1, 32, shift=2)),
        d=108,
        fields=(Plane(96, 8, 4, 8), Plane(104, 4, 2, 4, shift=4)),
    ),
    "Q4_K": Layout((Plane(16, 128, 4, 32),), dmin=2, six_bit=4),
    "Q5_K": Layout((Plane(48, 128, 4, 32), Plane(16, 32, 1, 32, shift=4)), dmin=2, six_bit=4),
    "Q6_K": Layout(
        (Plane(0, 128, 4, 64), Plane(128, 64, 2, 32, shift=4)),
        d=208,
        fields=(Plane(192, 16, 8, 16),),
        signed_fields=True,
    ),
    "IQ4_NL": Layout((Plane(2, 16, 4, 16),)),
    "IQ4_XS": Layout((Plane(8, 128, 4, 16),), fields=(Plane(4, 4, 4, 1), Plane(2, 2, 2, 1, shift=4))),
    "MXFP4": Layout((Plane(1, 16, 4, 16),)),
    "Q2_0": Layout((Plane(2, 16, 2, 1),)),
}
"""By ggml's name. No bit of a block is unused, so blocks <-> (codes, scales) is one to one."""


def pack(kind: BlockType, codes: Tensor, params: BlockParams) -> Tensor:
    """codes (..., out, in) uint8, level = kind.levels[code], and their scales -> blocks (..., out, row_bytes) uint8.

    Asserts that ``params`` can be stored as they are: nothing is rounded here.
    """
    assert codes.dtype == torch.uint8, f"codes are {codes.dtype}"
    blocks = codes.new_empty(*codes.shape[:-1], kind.row_bytes(codes.shape[-1]))
    n = codes.numel() // kind.block
    flat_codes, flat_params, flat_blocks = codes.reshape(n, kind.block), _flat(kind, params, n), _view(kind, blocks)
    for part in _slices(
        kind, n, codes.device, WRITTEN_SLICE if Backend.of(codes.device) is Backend.TRITON else DEVICE_SLICE
    ):
        _pack(kind, flat_codes[part], _rows(flat_params, part), flat_blocks[part])
    return blocks


def unpack(kind: BlockType, blocks: Tensor) -> tuple[Tensor, BlockParams]:
    """blocks (..., out, row_bytes) uint8 -> codes (..., out, in) uint8 and their scales. The inverse of `pack`."""
    flat = _view(kind, blocks)
    row_blocks = blocks.shape[-1] // kind.nbytes
    codes = blocks.new_empty(*blocks.shape[:-1], row_blocks * kind.block)
    flat_codes = codes.view(flat.shape[0], kind.block)
    for part in _slices(kind, flat.shape[0], blocks.device):
        _read_codes(kind, flat[part], flat_codes[part])
    params = _read_params(kind, flat)
    return codes, _shaped(params, blocks.shape[:-1], row_blocks)


def decode(kind: BlockType, blocks: Tensor) -> Tensor:
    """blocks (..., out, row_bytes) uint8 -> weights (..., out, in) float32, to the bit what llama.cpp's
    dequantize_row_* gives: products in the order of the C code, no fused multiply-add."""
    flat = _view(kind, blocks)
    weight = torch.empty(
        *blocks.shape[:-1], blocks.shape[-1] // kind.nbytes * kind.block, dtype=torch.float32, device=blocks.device
    )
    flat_weight = weight.view(flat.shape[0], kind.block)
    for part in _slices(kind, flat.shape[0], blocks.device):
        _decode(kind, flat[part], flat_weight[part])
    return weight


def _view(kind: BlockType, blocks: Tensor) -> Tensor:
    """(n, nbytes)"""
    assert blocks.dtype == torch.uint8, f"blocks are {blocks.dtype}"
    assert blocks.shape[-1] % kind.nbytes == 0, f"{blocks.shape[-1]} bytes are no whole blocks of {kind.name}"
    return blocks.reshape(blocks.numel() // kind.nbytes, kind.nbytes)


def _slices(kind: BlockType, n: int, device: torch.device, of_device: int = DEVICE_SLICE) -> Iterator[slice]:
    step = (CPU_SLICE if device.type == "cpu" else of_device) // kind.block
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _members(params: BlockParams) -> tuple[Tensor | None, ...]:
    return params.d, params.dmin, params.sub_scale, params.sub_min


def _flat(kind: BlockType, params: BlockParams, n: int) -> BlockParams:
    """Scales (n, 1) and sub-scales (n, groups), after a check that they are those of the type."""
    has = (True, bool(kind.offset), kind.sub_scale is not None, kind.sub_min is not None)
    assert has == tuple(x is not None for x in _members(params)), f"not the scales of {kind.name}: {has} are needed"
    widths = (1, 1, kind.groups, kind.groups)
    members = zip(_members(params), widths, strict=True)
    return _params(None if x is None else x.reshape(n, width) for x, width in members)


def _rows(params: BlockParams, part: slice) -> BlockParams:
    return _params(None if x is None else x[part] for x in _members(params))


def _shaped(params: BlockParams, lead: tuple[int, ...], row_blocks: int) -> BlockParams:
    """Scales (n, 1) and sub-scales (n, groups) -> (*lead, row_blocks) and (*lead, row_blocks * groups)."""
    return _params(None if x is None else x.reshape(*lead, row_blocks * x.shape[1]) for x in _members(params))


def _params(members: Iterable[Tensor | None]) -> BlockParams:
    d, dmin, sub_scale, sub_min = members
    assert d is not None
    return BlockParams(d, dmin, sub_scale, sub_min)


def _pack(kind: BlockType, codes: Tensor, params: BlockParams, blocks: Tensor) -> None:
    """codes (n, block), params (n, 1 or groups) into blocks (n, nbytes)."""
    layout = LAYOUTS[kind.name]
    assert int(codes.max()) < len(kind.levels), f"code {int(codes.max())} in {kind.name}"
    _write_planes(layout.codes, codes ^ SIGN if layout.signed_codes else codes, blocks)
    (_write_e8m0 if kind.name == "MXFP4" else _write_half)(params.d, blocks, layout.d)
    if params.dmin is not None and layout.dmin is not None:
        _write_half(params.dmin, blocks, layout.dmin)
    if params.sub_scale is not None:
        fields = [_unsigned(params.sub_scale, kind.sub_scale)]
        fields += [] if params.sub_min is None else [_unsigned(params.sub_min, kind.sub_min)]
        _write_fields(layout, torch.cat(fields, 1), blocks)


def _decode(kind: BlockType, blocks: Tensor, weight: Tensor) -> None:
    """blocks (n, nbytes) into weight (n, block) float32."""
    codes = blocks.new_empty(weight.shape)
    _read_codes(kind, blocks, codes)
    if kind.uniform:
        weight.copy_(codes.view(torch.int8).add_(kind.levels[0]))  # 8-bit wrap-around is meant: Q8_0 has 256 levels
    else:
        levels = torch.tensor(kind.levels, dtype=torch.float32, device=weight.device)
        torch.index_select(levels, 0, codes.view(-1).int(), out=weight.view(-1))
    params = _read_params(kind, blocks)
    groups = weight.view(-1, kind.groups, kind.group)
    groups.mul_(params.scale().unsqueeze(-1))
    offset = params.offset()
    if offset is not None:
        groups.add_(offset.unsqueeze(-1))


def _read_codes(kind: BlockType, blocks: Tensor, codes: Tensor) -> None:
    layout = LAYOUTS[kind.name]
    _read_planes(layout.codes, blocks, codes)
    if layout.signed_codes:
        codes ^= SIGN


def _read_params(kind: BlockType, blocks: Tensor) -> BlockParams:
    """Scales (n, 1) and sub-scales (n, groups) of blocks (n, nbytes)."""
    layout = LAYOUTS[kind.name]
    d = (_read_e8m0 if kind.name == "MXFP4" else _read_half)(blocks, layout.d)
    dmin = None if layout.dmin is None else _read_half(blocks, layout.dmin)
    if kind.sub_scale is None:
        return BlockParams(d, dmin)
    fields = _read_fields(kind, blocks).short()
    sub_scale = fields[:, : kind.groups] + kind.sub_scale[0]
    sub_min = None if kind.sub_min is None else fields[:, kind.groups :] + kind.sub_min[0]
    return BlockParams(d, dmin, sub_scale, sub_min)


def _read_planes(planes: tuple[Plane, ...], blocks: Tensor, numbers: Tensor) -> None:
    """Planes of blocks (n, nbytes) into numbers (n, count) uint8, contiguous."""
    for plane in planes:
        source, target = _chunks(plane, blocks[:, plane.start : plane.start + plane.nbytes]), _parts(plane, numbers)
        mask = _mask(plane)
        for part in range(plane.parts):
            bits = (source >> part * plane.bits).bitwise_and_(mask)
            if plane.shift:
                target[:, :, part] |= bits.bitwise_left_shift_(plane.shift)
            else:
                target[:, :, part] = bits


def _write_planes(planes: tuple[Plane, ...], numbers: Tensor, blocks: Tensor) -> None:
    """The inverse of `_read_planes`."""
    numbers = numbers.contiguous()
    if Backend.of(blocks.device) is Backend.TRITON:
        from quantkit.kernels.triton.ggml.layout import write_plane

        for plane in planes:
            write_plane(
                numbers, blocks, start=plane.start, nbytes=plane.nbytes, bits=plane.bits, run=plane.run,
                shift=plane.shift,
            )  # fmt: skip
        return
    for plane in planes:
        source, mask = _parts(plane, numbers), _mask(plane)
        packed = torch.zeros_like(source[:, :, 0], memory_format=torch.contiguous_format)
        for part in range(plane.parts):
            bits = (source[:, :, part] >> plane.shift).bitwise_and_(mask)
            packed |= bits.bitwise_left_shift_(part * plane.bits)
        blocks[:, plane.start : plane.start + plane.nbytes] = packed.view(torch.uint8).view(-1, plane.nbytes)


def _chunks(plane: Plane, stored: Tensor) -> Tensor:
    """Bytes (n, nbytes) of a plane -> (n, chunks, words of a run)."""
    # A copy always: blocks have odd sizes, and wider words need an aligned start.
    words = stored.clone(memory_format=torch.contiguous_format).view(plane.word)
    return words.view(words.shape[0], plane.chunks, words.shape[1] // plane.chunks)


def _parts(plane: Plane, numbers: Tensor) -> Tensor:
    """Numbers (n, count) uint8 -> the same memory as (n, chunks, parts, words of a run)."""
    words = numbers.view(plane.word)
    return words.view(words.shape[0], plane.chunks, plane.parts, words.shape[1] // (plane.chunks * plane.parts))


def _mask(plane: Plane) -> int:
    """The lowest ``bits`` of each byte of a word."""
    size = plane.word.itemsize
    return int.from_bytes(bytes([(1 << plane.bits) - 1]) * size, "little", signed=size > 1)


def _read_fields(kind: BlockType, blocks: Tensor) -> Tensor:
    """(n, groups), or (n, 2 * groups) with minima, uint8: stored integers less the lowest of their range."""
    layout = LAYOUTS[kind.name]
    if layout.six_bit is not None:
        low, mins, high = (blocks[:, layout.six_bit + i : layout.six_bit + i + 4] for i in (0, 4, 8))
        last_scales = (high & 15) | (low >> 6 << 4)
        last_mins = (high >> 4) | (mins >> 6 << 4)
        return torch.cat((low & 63, last_scales, mins & 63, last_mins), 1)
    count = kind.groups if kind.sub_min is None else 2 * kind.groups
    fields = blocks.new_empty(blocks.shape[0], count)
    _read_planes(layout.fields, blocks, fields)
    return fields ^ SIGN if layout.signed_fields else fields


def _write_fields(layout: Layout, fields: Tensor, blocks: Tensor) -> None:
    """The inverse of `_read_fields`."""
    if layout.six_bit is None:
        _write_planes(layout.fields, fields ^ SIGN if layout.signed_fields else fields, blocks)
        return
    first_scales, last_scales, first_mins, last_mins = fields.split(4, 1)
    stored = (
        first_scales | (last_scales >> 4 << 6),
        first_mins | (last_mins >> 4 << 6),
        (last_scales & 15) | (last_mins << 4),
    )
    blocks[:, layout.six_bit : layout.six_bit + 12] = torch.cat(stored, 1)


def _unsigned(values: Tensor, limits: tuple[int, int] | None) -> Tensor:
    """Integers within limits -> uint8, less the lowest."""
    assert limits is not None
    low, high = (int(x) for x in values.aminmax())
    assert limits[0] <= low <= high <= limits[1], f"sub-scales {low}..{high} do not fit {limits}"
    return (values - limits[0]).to(torch.uint8)


def _read_half(blocks: Tensor, start: int) -> Tensor:
    """float16 at a byte of blocks (n, nbytes) -> (n, 1) float32."""
    return blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _write_half(values: Tensor, blocks: Tensor, start: int) -> None:
    halves = values.half()
    assert torch.equal(halves.float(), values), "a scale is not a finite float16 value"
    assert bool(halves.isfinite().all()), "a scale is not a finite float16 value"
    # Flat first: a single column may count as contiguous with strides that a narrower view refuses.
    blocks[:, start : start + 2] = halves.flatten().contiguous().view(torch.uint8).unflatten(0, (-1, 2))


def _read_e8m0(blocks: Tensor, start: int) -> Tensor:
    """The byte of blocks (n, nbytes) -> 2 ** (byte - 128), (n, 1) float32. In the MX standard 255 is NaN, not here."""
    exponent = blocks[:, start : start + 1].int()
    bits = torch.where(exponent < 2, E8M0_BITS_0 << exponent.clamp(max=1), exponent - 1 << MANTISSA_BITS)
    return bits.view(torch.float32)


def _write_e8m0(values: Tensor, blocks: Tensor, start: int) -> None:
    bits = values.contiguous().view(torch.int32)
    exponent = bits >> MANTISSA_BITS
    blocks[:, start : start + 1] = torch.where(exponent > 0, exponent + 1, (bits > E8M0_BITS_0).int())
    assert torch.equal(_read_e8m0(blocks, start), values), "a scale is not a power of two from 2**-128 to 2**127"
