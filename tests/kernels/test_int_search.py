"""The compiled search of integer scales against its twin in torch: same candidates, in the same order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, using
from quantkit.schemes import IntScheme, affine_int

ROWS, WIDTH, MATRICES = 37, 384, 2


def heavy_tailed(seed: int) -> tuple[Tensor, Tensor]:
    """Weight (B, out, in), importance (B, in); rows of zeros, of one weight, and of few large ones are among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(MATRICES, ROWS, WIDTH, generator=generator) * 0.02
    weight /= torch.rand(weight.shape, generator=generator).sqrt()
    weight[:, 0] = 0
    weight[:, 1] = 0
    weight[:, 1, 5] = -3.0
    weight[:, 2, ::37] *= 30
    return weight, (torch.randn(MATRICES, WIDTH, generator=generator) * 1.5).exp()


def error(scheme: IntScheme, weight: Tensor, importance: Tensor | None, params: affine_int.Params) -> Tensor:
    """(B, out, groups) float64: squared error, as it is weighted."""
    missed = (weight - scheme.decode(scheme.encode(weight, *params), *params)).double().square()
    if importance is not None:
        missed *= importance[:, None]
    return missed.unflatten(-1, (params[0].shape[-1], -1)).sum(-1)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize(
    ("bits", "symmetric", "signed"),
    [
        *((bits, True, True) for bits in range(2, 9)),
        (2, True, False),
        (4, True, False),
        (3, False, True),
        (8, False, True),
    ],
)
def test_finds_what_the_twin_finds(
    bits: int, symmetric: bool, signed: bool, group_size: int | None, weighted: bool
) -> None:
    scheme = IntScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    weight, importance = heavy_tailed(bits)
    used = importance if weighted else None
    with using(Backend.TORCH):
        expected = scheme.fit(weight, used, signed=signed)
    found = scheme.fit(weight, used, signed=signed)
    assert found[0].shape == expected[0].shape
    assert found[0].dtype == expected[0].dtype
    if expected[1] is not None:
        assert found[1] is not None
        assert torch.equal(found[1], expected[1])
    # Gains that differ less than float32 rounds them are ties: the more bits, the more of them.
    same = torch.isclose(found[0], expected[0], rtol=1e-5, atol=0)
    assert float(same.double().mean()) > (0.98 if bits < 5 else 0.94)
    energy = weight.double().square()
    energy = (energy * importance[:, None] if weighted else energy).unflatten(-1, (expected[0].shape[-1], -1)).sum(-1)
    ours, theirs = error(scheme, weight, used, found), error(scheme, weight, used, expected)
    assert bool((ours <= theirs * (1 + 1e-6) + (4e-6 if bits < 5 else 2e-5) * energy).all())
    assert float(ours.sum()) <= float(theirs.sum()) * (1 + (1e-6 if bits < 5 else 1e-4))


def test_threads_change_nothing() -> None:
    weight, importance = heavy_tailed(0)
    threads = torch.get_num_threads()
    found: list[Tensor] = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(IntScheme(bits=3, group_size=32).fit(weight.repeat(1, 9, 1), importance)[0])
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_other_dtypes_keep_to_the_twin() -> None:
    weight, importance = heavy_tailed(1)
    before = IntScheme(bits=4).fit(weight.double(), importance.double())[0]
    with using(Backend.TORCH):
        assert torch.equal(IntScheme(bits=4).fit(weight.double(), importance.double())[0], before)


def test_a_flat_matrix_and_strided_rows() -> None:
    weight, importance = heavy_tailed(2)
    scheme = IntScheme(group_size=64)
    assert torch.equal(scheme.fit(weight[1], importance[1])[0], scheme.fit(weight, importance)[0][1])
    strided = weight.mT.contiguous().mT
    assert torch.equal(scheme.fit(strided, importance)[0], scheme.fit(weight, importance)[0])
