"""MXFP8 and int4 with FP8 inputs: values as the standards say, in float64; scales as vLLM serves them."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from quantkit.calibrate.inputs import InputStats
from quantkit.errors import SchemeError
from quantkit.quantizers import Gptq, Rtn
from quantkit.quantizers.ldlq.levels import fits_gpu_kernels
from quantkit.schemes import IntScheme, Mxfp4Scheme, Mxfp8Scheme, Scheme, W4AFp8Scheme
from tests.quantizers.test_ldlq import heavy_tailed_problem
from tests.quantizers.test_methods import loss
from tests.schemes.test_fp4 import weight_of

MXFP8, W4AFP8 = Mxfp8Scheme(), W4AFp8Scheme()
BOTH = [MXFP8, W4AFP8]


def wide(seed: int = 0) -> Tensor:
    """(2, 24, 384): groups of 32 and of 128."""
    return weight_of(seed, 2, 24, 384)


def problem() -> tuple[Tensor, InputStats]:
    """Two weights (40, 256), two groups of 128 a row, and their inputs."""
    parts = [heavy_tailed_problem(seed, 40, 256, 300) for seed in range(2)]
    weight, hessian = (torch.stack(part) for part in zip(*parts, strict=True))
    return weight, InputStats(hessian, None, (300, 300))


def e4m3(codes: Tensor) -> Tensor:
    """The values of bits, float64, from their definition: sign, four bits of exponent, three of fraction."""
    bits = codes.long()
    exponent, fraction = (bits >> 3) & 15, (bits & 7).double()
    small = fraction / 8 * 2.0**-6
    value = torch.where(exponent == 0, small, (1 + fraction / 8) * torch.exp2(exponent.double() - 7))
    return value * (1 - 2 * (bits >> 7)).double()


def as_served(scale: Tensor) -> Tensor:
    """What vLLM makes of the bfloat16 scales of a row: FP8 steps of one number, then an eighth of the steps."""
    values = scale.float()
    unit = (values.abs().amax(-1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    steps = (values / unit).to(torch.float8_e4m3fn)
    return (steps.float() / 8).to(torch.float8_e4m3fn).double() * 8 * unit.double()


def test_mxfp8_is_decoded_as_the_standard_says() -> None:
    stored = MXFP8.rounded(wide(), None, points=0, signed=True)
    powers = torch.exp2(stored["scale"].double() - 127).repeat_interleave(32, -1)
    decoded = MXFP8.decode(**stored)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.double(), e4m3(stored["codes"]) * powers)
    assert stored["codes"].unique().numel() > 100


def test_mxfp8_takes_the_least_power_that_cuts_nothing() -> None:
    weight = wide()
    scale = MXFP8.rounded(weight, None, points=0, signed=True)["scale"]
    reach = weight.unflatten(-1, (-1, 32)).abs().amax(-1).double() / torch.exp2(scale.double() - 127)
    assert torch.all(reach <= 448)
    assert torch.all(reach > 224)


@pytest.mark.parametrize("method", [Rtn(), Gptq(), Gptq(polish=0)], ids=["rtn", "gptq", "gptq without polish"])
def test_scales_of_w4afp8_are_served_as_they_are_stored(method: Rtn | Gptq) -> None:
    """Within the bfloat16 that they lie in; those of int4 lose up to a sixteenth."""
    weight, stats = problem()
    stored = method.quantizer(stats)(weight, W4AFP8).stored
    scale = stored["scale"]
    assert scale.dtype == torch.bfloat16
    assert float((as_served(scale) / scale.double() - 1).abs().max()) < 2**-8
    plain = Rtn().quantize(weight, IntScheme(), None).stored["scale"]
    assert float((as_served(plain) / plain.double() - 1).abs().max()) > 2**-6


def test_served_w4afp8_is_nearer_than_served_int4() -> None:
    weight = wide()
    errors: list[float] = []
    for scheme in (W4AFP8, IntScheme()):
        stored = scheme.rounded(weight, None, points=40, signed=True)
        served = (stored["codes"].double() - 8) * as_served(stored["scale"]).repeat_interleave(128, -1)
        errors.append(float((served - weight).square().sum()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_error_feedback_lowers_the_calibration_loss(scheme: Mxfp8Scheme | W4AFp8Scheme) -> None:
    weight, stats = problem()
    hessian = stats.hessian.clone()
    nearest = loss(weight, Rtn().quantize(weight, scheme, Rtn().prepare(stats)).decode(), hessian)
    swept = loss(weight, Gptq().quantizer(stats)(weight, scheme).decode(), hessian)
    assert torch.all(swept < 0.8 * nearest)


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_groups_of_zeros_and_tiny_and_huge_weights(scheme: Mxfp8Scheme | W4AFp8Scheme) -> None:
    weight = wide()
    weight[0, 0] = 0
    weight[0, 1] *= 1e-12
    weight[0, 2, 0] = 3e4
    weight[0, 3, :128] = 0
    for points in (0, 40):
        decoded = scheme.decode(**scheme.rounded(weight, None, points=points, signed=True))
        assert torch.isfinite(decoded).all()
        assert torch.all(decoded[0, 0] == 0)
        assert torch.all(decoded[0, 3, :128] == 0)
        torch.testing.assert_close(decoded[0, 2, 0], torch.tensor(3e4), rtol=0.25, atol=0)
        rest = slice(128, None)
        assert float((decoded[0, 3, rest] - weight[0, 3, rest]).norm() / weight[0, 3, rest].norm()) < 0.25


def test_long_tables_are_left_to_torch_on_gpus() -> None:
    weight = wide()
    grids = [scheme.grid(weight, None, points=0, signed=True) for scheme in (MXFP8, W4AFP8, Mxfp4Scheme())]
    assert [fits_gpu_kernels(grid) for grid in grids] == [False, True, True]


def test_mxfp8_refuses_what_is_no_number() -> None:
    weight = wide()
    weight[1, 2, 3] = torch.nan
    with pytest.raises(SchemeError, match="NaN or infinite"):
        MXFP8.rounded(weight, None, points=0, signed=True)


@pytest.mark.parametrize(
    ("scheme", "width", "group", "bpw"), [(MXFP8, 40, 32, 8.25), (W4AFP8, 64, 128, 4.125)], ids=["mxfp8", "w4afp8"]
)
def test_sizes_are_exact_and_rows_are_whole_groups(
    scheme: Mxfp8Scheme | W4AFp8Scheme, width: int, group: int, bpw: float
) -> None:
    assert scheme.bpw((8, 256)) == bpw
    assert scheme.group_size == group
    with pytest.raises(SchemeError, match=f"in_features {width} is not a multiple of"):
        scheme.check("a.weight", (8, width))
    with pytest.raises(SchemeError, match="is not a matrix"):
        scheme.check("a.weight", (8,))


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_through_json(scheme: Scheme) -> None:
    adapter: TypeAdapter[Scheme] = TypeAdapter(Scheme)
    assert adapter.validate_json(adapter.dump_json(scheme)) == scheme
