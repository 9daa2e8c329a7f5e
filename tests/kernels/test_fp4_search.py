"""The compiled search for NVFP4's scales chooses what its twin in torch chooses."""

from __future__ import annotations

import pytest
import torch

from quantkit.kernels.backend import Backend, backend_of
from quantkit.schemes import nvfp4


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 37, 64), (3, 5, 272)])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_scales_as_in_torch(shape: tuple[int, int, int], weighted: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    normal = torch.randn(shape, generator=generator)
    weight = normal * normal.abs() * 0.03
    weight[0, 0, :16], weight[0, 1, :16], weight[-1, -1, 3] = 0, 1e-9, 5
    importance = torch.rand(shape[0], shape[2], generator=generator) if weighted else torch.ones(shape[0], shape[2])
    if backend_of(weight) is not Backend.NUMBA:
        pytest.skip("no compiled kernels here")
    found = nvfp4.Nvfp4Scheme().grid(weight, importance, points=1, signed=True)
    start = nvfp4.Nvfp4Scheme().grid(weight, importance, points=0, signed=True)
    twin = nvfp4.fit_in_torch(weight, importance, start.float8_scale, start.global_scale)
    differ = found.float8_scale.view(torch.uint8) != twin.view(torch.uint8)
    assert int(differ.sum()) <= 1  # sums in another order, a tie
    assert bool((found.float8_scale.view(torch.uint8) != start.float8_scale.view(torch.uint8)).any())
