"""The Triton kernels of tuning against their twins in plain torch."""

from __future__ import annotations

import pytest
import torch

from quantkit.tuning import latents
from tests.kernels.on_gpu import DEVICE, INTERPRETED, MARKS

pytestmark = MARKS
SHAPES = [(2, 5, 12, 16), (1, 3, 3, 150), (2, 2, 1, 1201), (1, 4, 2, 1024)]
"""Matrices, rows, groups, weights of a group."""


def case(shape: tuple[int, int, int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    b, rows, groups, size = shape
    full = (b, rows, groups * size)
    gradient = torch.randn(full, generator=generator)
    gradient[torch.rand(full, generator=generator) < 0.1] = 0
    multiplier = torch.randn(b, rows, groups, generator=generator)
    multiplier[..., 0] *= multiplier[..., 0] > 0.5
    return {
        "index": torch.randint(13, full, generator=generator, dtype=torch.uint8),
        "offset": torch.randint(-(2**15), 2**15, full, generator=generator).to(torch.int16),
        "levels": torch.randn(13, generator=generator).sort().values,
        "multiplier": multiplier,
        "addend": torch.randn(b, rows, groups, generator=generator),
        "gradient": gradient,
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shifted", [True, False])
def test_decoding(shape: tuple[int, int, int, int], shifted: bool) -> None:
    from quantkit.kernels.triton import tuning as tuning_triton

    own = case(shape)
    addend = own["addend"] if shifted else None
    expected = latents.decode_in_torch(own["index"], own["levels"], own["multiplier"], addend, torch.float32)
    there = {name: value.to(DEVICE) for name, value in own.items()}
    given = (there["index"], there["levels"], there["multiplier"], there["addend"] if shifted else None)
    torch.testing.assert_close(tuning_triton.decode(*given, torch.float32).cpu(), expected)
    narrow = tuning_triton.decode(*given, torch.bfloat16).cpu()
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [0, 1, 66, 40_000])
def test_update(shape: tuple[int, int, int, int], step: int) -> None:
    from quantkit.kernels.triton import tuning as tuning_triton

    own = case(shape)
    there = {name: value.clone().to(DEVICE) for name, value in own.items()}
    names = ("index", "offset", "levels", "multiplier", "gradient")
    expected = latents.update_in_torch(*(own[name] for name in names), step)
    found = tuning_triton.update(*(there[name] for name in names), step)
    assert torch.equal(there["index"].cpu(), own["index"])
    assert torch.equal(there["offset"].cpu(), own["offset"])
    for mine, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), twin, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="nothing is dispatched in the interpreter")
def test_a_gpu_takes_them() -> None:
    own = case(SHAPES[0])
    there = {name: value.clone().cuda() for name, value in own.items()}
    names = ("index", "offset", "levels", "multiplier", "gradient")
    latents.update(*(there[name] for name in names), 0.001)
    latents.update(*(own[name] for name in names), 0.001)
    assert torch.equal(there["offset"].cpu(), own["offset"])
