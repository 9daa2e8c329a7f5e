"""The integer grid: what it can hold, and that the scale search comes close to a float64 search over thousands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.schemes import IntScheme, Scheme
from quantkit.schemes.affine_int import representable

EVERY = [
    IntScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    for bits in range(2, 9)
    for group_size, dtype in ((32, "bfloat16"), (None, "float16"), (64, "float32"))
    for symmetric in (True, False)
]


def heavy_tailed(seed: int = 0, rows: int = 24, columns: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp()


def round_trip(scheme: IntScheme, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    scale, zero = scheme.fit(weight, importance)
    return scheme.decode(scheme.encode(weight, scale, zero), scale, zero)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_a_weight_inside_the_grid_is_within_half_a_step(scheme: IntScheme) -> None:
    weight = heavy_tailed()
    scale, zero = scheme.fit(weight)
    codes = scheme.encode(weight, scale, zero)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= 2**scheme.bits - 1
    step = scale.float().abs().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    inside = (codes > 0) & (codes < 2**scheme.bits - 1)
    error = (scheme.decode(codes, scale, zero) - weight).abs()
    assert bool((error <= 0.5001 * step)[inside].all())


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_grid_points_come_back_exactly(scheme: IntScheme) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (6, 128)
    codes = torch.randint(0, 2**scheme.bits, shape, generator=generator, dtype=torch.uint8)
    scale = torch.randn(6, scheme.n_groups(128), generator=generator).to(getattr(torch, scheme.scale_dtype))
    zero = None if scheme.symmetric else torch.full(scale.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    assert torch.equal(scheme.encode(scheme.decode(codes, scale, zero), scale, zero), codes)


def oracle_error(row: np.ndarray, importance: np.ndarray, bits: int) -> float:
    """Least weighted squared error of one symmetric group over 4,000 scales of either sign, float64."""
    half = 2 ** (bits - 1)
    largest = np.abs(row).max()
    scales = np.concatenate([np.linspace(0.2, 1.2, 2000), -np.linspace(0.2, 1.2, 2000)]) * largest / (half - 0.5)
    levels = np.clip(np.rint(row / scales[:, None]), -half, half - 1)
    return float((importance * (levels * scales[:, None] - row) ** 2).sum(1).min())


# On a fine grid the best of 4,000 scales is a lucky one: 40 candidates come near, not to it.
@pytest.mark.parametrize(("bits", "ratio"), [(2, 1.02), (3, 1.02), (4, 1.02), (5, 1.02), (8, 1.1)])
def test_search_comes_close_to_a_float64_search_over_four_thousand_scales(bits: int, ratio: float) -> None:
    scheme = IntScheme(bits=bits, group_size=32, scale_dtype="float32")
    weight = heavy_tailed(bits)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(5)).exp()
    error = (round_trip(scheme, weight, importance) - weight).double().square() * importance
    found = error.view(24, 4, 32).sum(-1).numpy()
    weights = importance.view(4, 32).double().numpy()
    best = np.array(
        [
            [oracle_error(weight[r].view(4, 32)[g].double().numpy(), weights[g], bits) for g in range(4)]
            for r in range(24)
        ]
    )
    assert found.sum() <= ratio * best.sum()


def test_signed_scales_use_the_extra_level_on_the_positive_side() -> None:
    row = torch.linspace(-7, 8, 16).repeat(2)[None]  # only a negative scale holds the 8 without clipping
    scheme = IntScheme(bits=4, group_size=32)
    scale, _ = scheme.fit(row)
    assert float(scale) < 0
    torch.testing.assert_close(scheme.decode(scheme.encode(row, scale), scale), row)
    unsigned, _ = scheme.fit(row, signed=False)
    assert float(unsigned) > 0


@pytest.mark.parametrize(
    "scheme", [IntScheme(bits=4, group_size=32), IntScheme(bits=3, symmetric=False, group_size=32)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zero_constant_denormal_and_huge_rows(scheme: IntScheme, dtype: str) -> None:
    scheme = scheme.model_copy(update={"scale_dtype": dtype})
    rows = torch.stack(
        [torch.zeros(64), torch.full((64,), 3.0), torch.full((64,), -2.0), torch.full((64,), 1e-42), torch.arange(64.0)]
    )
    decoded = round_trip(scheme, rows)
    assert bool(decoded.isfinite().all())
    assert bool((decoded[0] == 0).all())
    assert bool((decoded[3].abs() <= 1e-30).all())
    torch.testing.assert_close(decoded[1], rows[1], rtol=0.01, atol=0)
    torch.testing.assert_close(decoded[2], rows[2], rtol=0.01, atol=0)
    huge = round_trip(scheme, torch.full((1, 64), 1e5 if dtype == "float16" else 1e30))
    assert bool(huge.isfinite().all())


def test_representable_never_gives_zero_or_infinity() -> None:
    scheme = IntScheme(scale_dtype="float16")
    scale = representable(scheme, torch.tensor([0.0, 1e-12, 1e9, -1e9, torch.nan, 0.1]))
    assert scale.tolist()[:2] == [1.0, 1.0]
    assert scale[2] == 65504
    assert scale[3] == -65504
    assert scale[4] == 1.0
    assert scale[5] == torch.tensor(0.1).half().float()


@pytest.mark.parametrize(
    ("scheme", "shape", "bpw"),
    [
        (IntScheme(bits=4, group_size=128), (2048, 7168), 4.125),
        (IntScheme(bits=4, group_size=128, symmetric=False), (2048, 7168), 4.15625),
        (IntScheme(bits=3, group_size=32), (64, 256), 3.5),
        (IntScheme(bits=8, group_size=None), (64, 256), 8.0625),
        (IntScheme(bits=8, group_size=None, scale_dtype="float32"), (64, 256), 8.125),
    ],
)
def test_bits_per_weight(scheme: IntScheme, shape: tuple[int, int], bpw: float) -> None:
    assert scheme.bpw(shape) == pytest.approx(bpw)


def test_refusals_name_the_tensor() -> None:
    with pytest.raises(SchemeError, match=r"^a\.weight: in_features 100 is not a multiple of group_size 128"):
        IntScheme().check("a.weight", (8, 100))
    with pytest.raises(SchemeError, match=r"^b: shape \[4\] is not a matrix"):
        IntScheme().check("b", (4,))


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_json_round_trip(scheme: IntScheme) -> None:
    adapter: TypeAdapter[IntScheme] = TypeAdapter(Scheme)
    assert adapter.validate_json(scheme.model_dump_json()) == scheme


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grid", [0, 20])
def test_weights_that_no_float16_scale_reaches_are_refused(symmetric: bool, grid: int) -> None:
    scheme = IntScheme(bits=4, group_size=32, symmetric=symmetric, scale_dtype="float16")
    weight = torch.ones(1, 4, 64)
    weight[0, 2, 40] = 3e7
    with pytest.raises(SchemeError, match=r"row 2: no float16 scale of int4 g32.* fits .* reach from 1 to 3e\+07"):
        scheme.fit(weight, grid=grid)
    weight[0, 2, 40] = -1e5
    decoded = scheme.decode(*scheme.rounded(weight, None, points=grid, signed=True).values())
    assert decoded[0, 2, 40] == pytest.approx(-1e5, rel=0.07)
    scheme.model_copy(update={"scale_dtype": "bfloat16"}).fit(weight * 300, grid=grid)
