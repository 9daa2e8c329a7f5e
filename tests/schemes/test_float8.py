"""FP8 blocks decode like a loop over tiles, partial edge tiles included."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.schemes import Float8Scheme


@pytest.mark.parametrize("shape", [(128, 128), (576, 256), (100, 300), (1, 1)])
def test_decode_equals_a_loop_over_tiles(shape: tuple[int, int]) -> None:
    scheme = Float8Scheme()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scheme.scale_shape(shape), generator=generator) + 0.1
    expected = codes.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    assert torch.equal(scheme.decode(codes, scale), expected)


def test_sizes_of_deepseek_v3s_kv_a_projection() -> None:
    assert Float8Scheme().scale_shape((576, 7168)) == (5, 56)
    assert Float8Scheme().bpw((2048, 7168)) == pytest.approx(8 + 32 / 128 / 128)
    with pytest.raises(SchemeError, match="not a matrix"):
        Float8Scheme().check("norm", (7168,))
