"""NVFP4 and MXFP4: values as the standards say, in float64; scales that no other storable scale beats; one global scale
for what shares it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.quantizers import Gptq, Rtn
from quantkit.schemes import GgmlScheme, Mxfp4Scheme, Nvfp4Scheme, Scheme
from tests.quantizers.test_methods import loss, problem

Stored = Mapping[str, Tensor]
NVFP4, MXFP4 = Nvfp4Scheme(), Mxfp4Scheme()
BOTH = [NVFP4, MXFP4]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FLOAT8 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""Every positive e4m3 value."""


def weight_of(seed: int = 0, *shape: int) -> Tensor:
    """Heavy tails, as weights have them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape or (2, 24, 64), generator=generator)
    return normal * normal.abs() * 0.02


def exactly(stored: Stored, group: int) -> Tensor:
    """The weight in float64, code by code."""
    codes = stored["codes"].long()
    values = torch.tensor(E2M1, dtype=torch.float64)[codes & 7] * (1 - 2 * (codes >> 3)).double()
    if "global_scale" in stored:
        scale = stored["scale"].double() / stored["global_scale"].double()
    else:
        scale = torch.exp2(stored["scale"].double() - 127)
    return values * scale.repeat_interleave(group, -1)


def rounded(
    scheme: Nvfp4Scheme | Mxfp4Scheme, weight: Tensor, importance: Tensor | None = None, points: int = 40
) -> Stored:
    return scheme.rounded(weight, importance, points=points, signed=True)


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_decoded_as_the_standard_says(scheme: Nvfp4Scheme | Mxfp4Scheme) -> None:
    stored = rounded(scheme, weight_of())
    decoded = scheme.decode(**stored)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), exactly(stored, scheme.group_size), rtol=2e-7, atol=0)
    assert stored["codes"].unique().numel() >= 14


def best_error(weight: Tensor, importance: Tensor, scales: Tensor) -> Tensor:
    """weight, importance (n, group), scales (n, m), float64 -> the least weighted error over all scales (n,)."""
    levels = torch.tensor([*E2M1, *(-v for v in E2M1[1:])], dtype=torch.float64)
    distance = (weight[:, None, :, None] - scales[:, :, None, None] * levels).square().amin(-1)
    return (distance * importance[:, None]).sum(-1).amin(-1)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_float8_scale_is_better_than_the_one_found(weighted: bool) -> None:
    """Of all 126, given the global scale; but for a few groups whose best scale lies far off."""
    weight = weight_of()
    importance = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) if weighted else None
    stored = rounded(NVFP4, weight, importance)
    shares = torch.ones(2, 64) if importance is None else importance
    groups = weight.double().view(-1, 16)
    weighting = shares.double().view(2, 1, 4, 16).expand(2, 24, 4, 16).reshape(-1, 16)
    divisors = stored["global_scale"].double().expand(2, 24, 4).reshape(-1, 1)
    error = (exactly(stored, 16).view(-1, 16) - groups).square().mul(weighting).sum(-1)
    best = best_error(groups, weighting, FLOAT8 / divisors)
    assert float((error <= best * (1 + 1e-5)).double().mean()) > 0.95
    assert float(error.sum()) < 1.01 * float(best.sum())


def test_no_power_of_two_is_better_than_the_one_found() -> None:
    weight = weight_of()
    stored = rounded(MXFP4, weight)
    groups = weight.double().view(-1, 32)
    error = (exactly(stored, 32).view(-1, 32) - groups).square().sum(-1)
    best = best_error(
        groups, torch.ones_like(groups), torch.exp2(torch.arange(-30.0, 10).double()).expand(len(groups), -1)
    )
    assert torch.all(error <= best * (1 + 1e-6))


def test_the_whole_range_is_the_scale_of_the_largest_weight() -> None:
    weight = weight_of()
    stored = rounded(NVFP4, weight, points=0)
    reach = weight.abs().amax((1, 2))
    torch.testing.assert_close(stored["global_scale"][:, 0, 0], 448 * 6 / reach)
    wanted = weight.view(2, 24, 4, 16).abs().amax(-1) / 6 * stored["global_scale"]
    assert torch.equal(stored["scale"].float(), wanted.to(torch.float8_e4m3fn).float())
    searched = NVFP4.decode(**rounded(NVFP4, weight)) - weight
    assert float(searched.square().sum()) < 0.85 * float((NVFP4.decode(**stored) - weight).square().sum())


def test_mxfp4_is_ggmls_grid_in_other_bytes() -> None:
    weight, ggml = weight_of(), GgmlScheme(type="MXFP4")
    blocks = ggml.rounded(weight, None, points=0, signed=True)
    assert torch.equal(MXFP4.decode(**rounded(MXFP4, weight)), ggml.decode(**blocks))
    assert torch.equal(rounded(MXFP4, weight)["scale"], blocks["blocks"].view(2, 24, 2, 17)[..., 0])


@pytest.mark.parametrize("scheme", BOTH, ids=str)
@pytest.mark.parametrize("method", [Rtn(), Gptq(), Gptq(polish=0)], ids=["rtn", "gptq", "gptq without polish"])
def test_methods_keep_to_what_can_be_stored(scheme: Nvfp4Scheme | Mxfp4Scheme, method: Rtn | Gptq) -> None:
    weight, stats = problem()
    batch = method.quantizer(stats)(weight, scheme)
    decoded = exactly(batch.stored, scheme.group_size)
    torch.testing.assert_close(batch.decode().double(), decoded, rtol=2e-7, atol=0)
    assert batch.stored["codes"].max() < 16


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_error_feedback_lowers_the_calibration_loss(scheme: Nvfp4Scheme | Mxfp4Scheme) -> None:
    weight, stats = problem()
    hessian = stats.hessian.clone()
    nearest = loss(weight, Rtn().quantize(weight, scheme, Rtn().prepare(stats)).decode(), hessian)
    swept = loss(weight, Gptq().quantizer(stats)(weight, scheme).decode(), hessian)
    assert torch.all(swept < 0.75 * nearest)


def test_what_shares_a_global_scale_is_told_how_far_it_reaches() -> None:
    weight = weight_of()
    reach = weight.abs().amax((1, 2)) * torch.tensor([1.0, 8.0])
    for method in (Rtn(), Rtn(scale_search="range")):
        stored = method.quantizer(None)(weight, NVFP4, reach=reach).stored
        torch.testing.assert_close(stored["global_scale"], (448 * 6 / reach)[:, None, None].expand(2, 24, 1))


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_groups_of_zeros_and_tiny_and_huge_weights(scheme: Nvfp4Scheme | Mxfp4Scheme) -> None:
    weight = weight_of()
    weight[0, 0] = 0
    weight[0, 1] *= 1e-12
    weight[0, 2, 0] = 3e4
    zeros = torch.zeros(1, 4, 64)
    for points in (0, 40):
        decoded = scheme.decode(**rounded(scheme, weight, points=points))
        assert torch.isfinite(decoded).all()
        assert torch.all(decoded[0, 0] == 0)
        torch.testing.assert_close(decoded[0, 2, 0], torch.tensor(3e4), rtol=0.25, atol=0)
        assert torch.all(scheme.decode(**rounded(scheme, zeros, points=points)) == 0)


@pytest.mark.parametrize("scheme", BOTH, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(scheme: Nvfp4Scheme | Mxfp4Scheme, value: float) -> None:
    weight = weight_of()
    weight[1, 2, 3] = value
    with pytest.raises(SchemeError, match="NaN|fits the value"):
        rounded(scheme, weight)


def test_sizes_and_shapes() -> None:
    assert NVFP4.bpw((1024, 512)) == 4.5 + 32 / (1024 * 512)
    assert MXFP4.bpw((1024, 512)) == 4.25
    for scheme, width in ((NVFP4, 40), (MXFP4, 48)):
        scheme.check("a.weight", (7, 64))
        with pytest.raises(SchemeError, match=rf"in_features {width} is not a multiple of {scheme.group_size}"):
            scheme.check("a.weight", (7, width))
        with pytest.raises(SchemeError, match="is not a matrix"):
            scheme.check("a.weight", (7,))
        read = TypeAdapter(Scheme).validate_json(scheme.model_dump_json())
        assert read == scheme
