"""The Triton kernels that decode, and those of norms and rotations, against their twins in plain torch."""

from __future__ import annotations

import pytest
import torch

from quantkit.arch import ops
from quantkit.formats.fp8_source import decode_blocks
from quantkit.schemes import IntScheme
from tests.kernels.on_gpu import DEVICE, INTERPRETED, MARKS

pytestmark = MARKS


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zero", [8.0, None])
def test_decoding(scale_dtype: str, zero: float | None) -> None:
    from quantkit.kernels.triton import decode as decode_triton

    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (2, 5, 1200), generator=generator, dtype=torch.uint8)
    scale = torch.randn(2, 5, 8, generator=generator).to(getattr(torch, scale_dtype))
    zeros = torch.randint(16, (2, 5, 8), generator=generator, dtype=torch.uint8) if zero is None else None
    scheme = IntScheme(bits=4, group_size=150, symmetric=zeros is None, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    expected = scheme.decode(codes, scale, zeros)
    given = zero if zeros is None else zeros.to(DEVICE)
    assert torch.equal(decode_triton.decode(codes.to(DEVICE), scale.to(DEVICE), given).cpu(), expected)


@pytest.mark.parametrize("skipped", [0, 3])
def test_decoding_of_fp8_blocks(skipped: int) -> None:
    from quantkit.kernels.triton import decode as decode_triton

    generator = torch.Generator().manual_seed(4)
    codes = torch.arange(256, dtype=torch.uint8).repeat(7, 5)[:, :1201].contiguous().view(torch.float8_e4m3fn)
    scale = torch.randn(3, 76, generator=generator).exp()
    if INTERPRETED:  # which cuts what bfloat16 cannot hold
        scale = scale.log2().round().exp2()
    expected = decode_blocks(codes, scale, (4, 16), skipped)
    found = decode_triton.decode_fp8_blocks(codes.to(DEVICE), scale.to(DEVICE), (4, 16), skipped).cpu()
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("width", [5, 1024, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(width: int, dtype: torch.dtype) -> None:
    from quantkit.kernels.triton.norm import rms_norm

    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(2, 3, width, generator=generator) * torch.tensor([1.0, 1e-4, 50.0])[:, None]).to(dtype)
    weight = torch.randn(width, generator=generator)
    expected = torch.nn.functional.rms_norm(x.float(), (width,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6).cpu(), expected)
    narrow = rms_norm(x.to(DEVICE), weight.bfloat16().to(DEVICE), 1e-6).cpu()
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", [6, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    from quantkit.kernels.triton.norm import rotate_

    generator = torch.Generator().manual_seed(6)
    heads = torch.randn(2, 7, 5, 10 + dim, generator=generator).to(dtype)
    cos, sin = torch.randn(2, 7, dim // 2, generator=generator)
    expected = heads.clone()
    expected[..., 10:] = ops.rotate(heads[..., 10:].float(), cos[:, None], sin[:, None], interleaved).to(dtype)
    heads = heads.to(DEVICE)
    rotate_(heads[..., 10:], cos.to(DEVICE), sin.to(DEVICE), interleaved)
    if dtype == torch.bfloat16:  # the interpreter cuts what bfloat16 cannot hold
        torch.testing.assert_close(heads.cpu(), expected, rtol=2**-7, atol=1e-3)
    else:
        torch.testing.assert_close(heads.cpu(), expected)


@pytest.mark.skipif(INTERPRETED, reason="nothing is dispatched in the interpreter")
@pytest.mark.parametrize("width", [1024, 16385])
def test_a_gpu_gives_what_a_processor_does(width: int) -> None:
    """Through the package's functions, whichever kernel they take."""
    generator = torch.Generator().manual_seed(8)
    x, weight = torch.randn(3, width, generator=generator), torch.randn(width, generator=generator)
    torch.testing.assert_close(ops.rms_norm(x.cuda(), weight.cuda(), 1e-6).cpu(), ops.rms_norm(x, weight, 1e-6))
    heads, angles = torch.randn(2, 4, 3, 20, generator=generator), torch.randn(2, 4, 4, generator=generator)
    on_gpu = heads.cuda()
    ops.rotate_heads_(on_gpu[..., 12:], *angles.cuda(), True)
    ops.rotate_heads_(heads[..., 12:], *angles, True)
    torch.testing.assert_close(on_gpu.cpu(), heads)
    codes = torch.randint(256, (130, width), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(2, -(-width // 128), generator=generator) + 0.1
    found = decode_blocks(codes.cuda(), scale.cuda()).cpu()
    torch.testing.assert_close(found, decode_blocks(codes, scale), rtol=0, atol=0, equal_nan=True)
    scheme = IntScheme(bits=4, group_size=None)
    ints = torch.randint(16, (2, 3, width), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, 3, 1, generator=generator).bfloat16()
    assert torch.equal(scheme.decode(ints.cuda(), scales.cuda()).cpu(), scheme.decode(ints, scales))
