"""Gains of rows: against float64 least squares over tokens, and in the scales of every scheme that takes them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.inputs import InputMoments, InputStats
from quantkit.quantizers import Gptq, batch
from quantkit.quantizers.row_gains import gained, row_gains, takes_row_gains
from quantkit.schemes import Bnb4Scheme, ChosenScheme, GgmlScheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme
from quantkit.schemes.ggml.types import BLOCK_TYPES
from tests.quantizers.test_two_sided import factored

CPU = torch.device("cpu")
TAKEN: Mapping[str, tuple[ChosenScheme, float]] = {
    "int4": (IntScheme(bits=4, group_size=64), 2**-8),
    "int3, zero points": (IntScheme(bits=3, group_size=64, symmetric=False), 2**-8),
    "int8, channels, float16": (IntScheme(bits=8, group_size=None, scale_dtype="float16"), 2**-10),
    **{
        name: (GgmlScheme.model_validate({"type": name}), 2**-10)
        for name, kind in BLOCK_TYPES.items()
        if name != "MXFP4" and kind.block <= 256
    },
}
NOT_TAKEN: tuple[ChosenScheme, ...] = (
    GgmlScheme(type="MXFP4"),
    Mxfp4Scheme(),
    Nvfp4Scheme(),
    Bnb4Scheme(),
)


def tokens(seed: int = 0, count: int = 400, width: int = 256) -> tuple[Tensor, Tensor]:
    """A token in the calibrated and in the unquantised stream, (count, width) each."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=random) * torch.linspace(0.2, 2, width)
    return x, 1.1 * x + 0.2 * torch.randn(count, width, generator=random)


def stats_of(x: Tensor, y: Tensor | None) -> InputStats:
    sums = InputMoments(x.shape[1], cross=y is not None, device=CPU)
    sums.add(x, y)
    stats = sums.stats()
    assert isinstance(stats, InputStats)
    return stats


@pytest.mark.parametrize("two_streams", [True, False])
def test_gains_are_least_squares_of_each_rows_output(two_streams: bool) -> None:
    x, y = tokens()
    weight = torch.randn(2, 6, 256, generator=torch.Generator().manual_seed(1))
    decoded = weight + 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    stats = stats_of(x, y if two_streams else None)
    found = row_gains(weight, decoded, stats.hessian.expand(2, -1, -1), stats.cross)
    original = (y if two_streams else x).double()
    for matrix in range(2):
        for row in range(6):
            made, wanted = x.double() @ decoded[matrix, row].double(), original @ weight[matrix, row].double()
            expected = float(torch.linalg.lstsq(made[:, None], wanted[:, None]).solution)
            assert abs(float(found[matrix, row]) - expected) < 1e-5


def test_rows_that_no_gain_could_mend_stay() -> None:
    x, _ = tokens()
    weight = torch.randn(1, 3, 256)
    decoded = torch.stack([weight[0, 0], 0 * weight[0, 1], -weight[0, 2]])[None]
    found = row_gains(weight, decoded, stats_of(x, None).hessian, None)
    torch.testing.assert_close(found, torch.ones(1, 3))


@pytest.mark.parametrize("name", TAKEN)
def test_scales_are_multiplied_to_within_what_is_stored(name: str) -> None:
    scheme, step = TAKEN[name]
    weight = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(4))
    gains = torch.tensor([[1.0, 0.9, 1.1, 1.003, 1.5], [1.0, 0.6, 1.9, 0.997, 1.0]])
    stored = scheme.rounded(weight, torch.ones(2, 512), points=8, signed=True)
    before, after = scheme.decode(**stored), scheme.decode(**gained(scheme, stored, gains))
    assert takes_row_gains(scheme)
    assert torch.equal(after[gains == 1], before[gains == 1])
    wanted = before * gains[:, :, None]
    reach = before.abs().amax(-1, keepdim=True)
    assert bool(((after - wanted).abs() <= 2 * step * reach).all())
    assert float((after / before)[1, 2].nanmedian()) == pytest.approx(1.9, rel=step)


@pytest.mark.parametrize("scheme", NOT_TAKEN, ids=lambda scheme: scheme.label)
def test_powers_of_two_and_shared_scales_take_none(scheme: ChosenScheme) -> None:
    stored = scheme.rounded(torch.randn(1, 4, 256), None, points=4, signed=True, reach=torch.ones(1))
    assert not takes_row_gains(scheme)
    assert gained(scheme, stored, torch.full((1, 4), 1.1)) is stored


@pytest.mark.parametrize("aware", [False, True])
def test_gptq_folds_them_where_outputs_go_to_the_residual(aware: bool) -> None:
    x, y = tokens(count=2000)
    weight = torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(5))
    factor = factored(torch.eye(16)[None, None] + 0.3) if aware else None
    scheme = IntScheme(bits=3, group_size=64)
    plain = Gptq().quantizer(stats_of(x, y))(weight, scheme, output_factor=factor, to_residual=True)
    asked = Gptq(row_gains=True)
    inner = asked.quantizer(stats_of(x, y))(weight, scheme, output_factor=factor)
    made = asked.quantizer(stats_of(x, y))(weight, scheme, output_factor=factor, to_residual=True)
    assert torch.equal(inner.decode(), plain.decode())
    assert torch.equal(made.stored["codes"], plain.stored["codes"])
    wanted = y @ weight[0].T
    before, after = ((x @ one.decode()[0].T - wanted).square().sum(0) for one in (plain, made))
    assert bool((after <= before * 1.001).all())
    assert float(after.sum()) < float(before.sum())
    assert torch.equal(made.norm, plain.norm)
    assert made.fallbacks == plain.fallbacks


@pytest.mark.parametrize("name", ["int4", "Q4_K", "IQ3_XXS"])
def test_slices_of_rows_get_the_gains_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SLICE_BYTES", 4 * 2 * 256 * 5)
    x, y = tokens()
    weight, (scheme, _) = torch.randn(2, 12, 256, generator=torch.Generator().manual_seed(6)), TAKEN[name]
    plain, asked = Gptq(), Gptq(row_gains=True)
    before = plain.quantizer(twice(x, y))(weight, scheme, to_residual=True)
    made = asked.quantizer(twice(x, y))(weight, scheme, to_residual=True)
    prepared = plain.prepare(twice(x, y))
    gains = row_gains(weight, before.decode(), prepared.factor.hessian, prepared.cross)
    wanted = scheme.decode(**gained(scheme, before.stored, gains))
    assert not torch.equal(made.decode(), before.decode())
    torch.testing.assert_close(made.decode(), wanted, rtol=2**-7, atol=1e-6)
    assert made.loss.shape == (2, 12)


def twice(x: Tensor, y: Tensor) -> InputStats:
    """Two matrices that the same tokens feed."""
    stats = stats_of(x, y)
    assert stats.cross is not None
    return InputStats(stats.hessian.repeat(2, 1, 1), stats.cross.repeat(2, 1, 1), (len(x), len(x)))
