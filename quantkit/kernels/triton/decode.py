# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""Decoding integer and FP8 codes on a GPU in one pass: torch takes three, each over float32."""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

_COLUMNS = 1024
_ONE_COMPILES = threading.Lock()
"""Threads that read ahead decode at the same time, and Triton may not take two first launches of a kernel at once."""


@triton.jit
def _decode(
    codes, scale, zeros, result, zero, in_features, n_groups, size, ZEROS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < in_features
    at = row * n_groups + columns // size
    middle = zero
    if ZEROS:
        middle = tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
    levels = tl.load(codes + row * in_features + columns, mask=inside, other=0).to(tl.float32) - middle
    values = levels * tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row * in_features + columns, values, mask=inside)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """codes (..., out, in) uint8, scale (..., out, groups) of any float dtype, zero the same in uint8, or one for all
    -> (codes - zero) * scale (..., out, in) float32."""
    in_features, n_groups = codes.shape[-1], scale.shape[-1]
    assert scale.shape[:-1] == codes.shape[:-1], f"scales {list(scale.shape)} of codes {list(codes.shape)}"
    assert in_features % n_groups == 0, f"{n_groups} groups of {in_features} codes"
    result = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    codes, scale = codes.contiguous(), scale.contiguous()
    given = isinstance(zero, Tensor)
    assert not given or zero.shape == scale.shape, "a zero point for each scale"
    if codes.numel():
        with device_of(codes):
            _decode[(codes.numel() // in_features, triton.cdiv(in_features, _COLUMNS))](
                codes, scale, zero.contiguous() if given else scale, result, 0.0 if given else zero,
                in_features, n_groups, in_features // n_groups, ZEROS=given, COLUMNS=_COLUMNS, num_warps=4,
            )  # fmt: skip
    return result


@triton.jit
def _decode_fp8(
    codes, scale, result, in_features, n_blocks, block_rows, block_columns, skipped_rows, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < in_features
    code = tl.load(codes + row * in_features + columns, mask=inside, other=0).to(tl.int32)
    # Exponent and mantissa where float32 has them, and 2**(127 - 7) for the other bias: exact, subnormals too.
    size = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    size = tl.where((code & 0x7F) == 0x7F, float("nan"), size)
    value = tl.where(code >= 0x80, -size, size)
    blocks = scale + (row + skipped_rows) // block_rows * n_blocks + columns // block_columns
    value = value * tl.load(blocks, mask=inside, other=0.0)
    tl.store(result + row * in_features + columns, value.to(tl.bfloat16), mask=inside)


def decode_fp8_blocks(codes: Tensor, scale: Tensor, block_size: tuple[int, int], skipped_rows: int) -> Tensor:
    """As `quantkit.formats.fp8_source.decode_blocks`: codes (rows, in) float8_e4m3fn, scale (row blocks, in blocks)
    float32 -> (rows, in) bfloat16."""
    n_rows, in_features = codes.shape
    needed = triton.cdiv(skipped_rows + n_rows, block_size[0]), triton.cdiv(in_features, block_size[1])
    assert all(map(int.__ge__, scale.shape, needed)), f"scales {list(scale.shape)}, {list(needed)} were needed"
    result = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    if codes.numel():
        with _ONE_COMPILES, device_of(codes):
            _decode_fp8[(n_rows, triton.cdiv(in_features, _COLUMNS))](
                codes.contiguous().view(torch.uint8), scale.contiguous(), result,
                in_features, scale.shape[1], *block_size, skipped_rows, COLUMNS=_COLUMNS, num_warps=4,
            )  # fmt: skip
    return result
