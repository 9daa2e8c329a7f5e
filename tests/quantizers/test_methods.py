"""What every method owes its caller, and what GPTQ reports when it cannot do what was asked."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibrate.inputs import InputStats
from quantkit.errors import CalibrationError
from quantkit.quantizers import Gptq, Rtn
from quantkit.schemes import IntScheme
from tests.quantizers.test_ldlq import heavy_tailed_problem

SCHEMES = [IntScheme(bits=4, group_size=32), IntScheme(bits=3, group_size=None), IntScheme(bits=8, symmetric=False)]


def problem(n: int = 3) -> tuple[torch.Tensor, InputStats]:
    parts = [heavy_tailed_problem(seed, 40, 128, 300) for seed in range(n)]
    weight, hessian = (torch.stack(part) for part in zip(*parts, strict=True))
    return weight, InputStats(hessian, None, (300,) * n)


def loss(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    error = (weight - decoded).double()
    return ((error @ hessian.double()) * error).sum((-2, -1))


@pytest.mark.parametrize("method", [Rtn(), Rtn(scale_search="mse"), Rtn(scale_search="range"), Gptq()], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_batch_is_what_each_matrix_alone_gives(method: Rtn | Gptq, scheme: IntScheme) -> None:
    weight, stats = problem()
    hessian = stats.hessian.clone()
    batch = method.quantizer(stats)(weight, scheme)
    assert batch.stored["codes"].shape == weight.shape
    assert batch.stored["codes"].dtype == torch.uint8
    assert int(batch.stored["codes"].max()) < 2**scheme.bits
    assert batch.fallbacks == ("",) * 3
    for index in range(3):
        alone = InputStats(hessian[index : index + 1].clone(), None, (300,))
        single = method.quantizer(alone)(weight[index : index + 1], scheme)
        assert float((single.stored["codes"][0] != batch.stored["codes"][index]).float().mean()) < 0.01  # rounding ties only
        torch.testing.assert_close(single.relative_loss[0], batch.relative_loss[index], rtol=0.02, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_part_of_gptq_lowers_the_calibration_loss(scheme: IntScheme) -> None:
    weight, stats = problem()
    hessian = stats.hessian.clone()

    def total(method: Rtn | Gptq) -> float:
        fresh = InputStats(hessian.clone(), None, stats.n_tokens)
        batch = method.quantizer(fresh)(weight, scheme)
        return float(loss(weight, batch.decode(), hessian).sum())

    plain, once, twice = (total(Gptq(polish=rounds, damp_percent=1e-4)) for rounds in (0, 1, 2))
    assert plain < 0.9 * total(Rtn())
    assert once < plain
    assert twice < once


def test_an_expert_without_tokens_is_rounded_to_nearest_and_says_so() -> None:
    weight, stats = problem()
    stats.hessian[1] = 0
    scheme = IntScheme(bits=4, group_size=32)
    method = Gptq()
    batch = method.quantize(weight, scheme, method.prepare(InputStats(stats.hessian, None, (300, 0, 300))))
    assert batch.fallbacks == ("", "no calibration tokens: round to nearest", "")
    best = Rtn(scale_search="mse").quantize(weight[1:2], scheme, None)
    error = float((batch.decode()[1] - weight[1]).square().sum())
    assert error <= 1.02 * float((best.decode()[0] - weight[1]).square().sum())


def test_inputs_that_are_not_finite_are_refused() -> None:
    weight, stats = problem(1)
    stats.hessian[0, 3, 3] = torch.inf
    with pytest.raises(CalibrationError, match="not numbers"):
        Gptq().prepare(stats)
    assert weight.isfinite().all()


def test_rows_in_slices_give_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = problem()
    scheme, method = SCHEMES[0], Gptq()
    whole = method.quantize(weight, scheme, method.prepare(InputStats(stats.hessian.clone(), None, stats.n_tokens)))
    monkeypatch.setattr("quantkit.quantizers.gptq.SLICE_BYTES", 7 * 4 * 128 * 3)
    slices = method.quantize(weight, scheme, method.prepare(stats))
    assert float((slices.stored["codes"] != whole.stored["codes"]).float().mean()) < 0.005
    torch.testing.assert_close(slices.relative_loss, whole.relative_loss, rtol=0.01, atol=0)
