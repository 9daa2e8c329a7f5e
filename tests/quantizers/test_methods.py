"""What every method owes its caller, and what GPTQ reports when it cannot do what was asked."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibrate.inputs import InputStats
from quantkit.errors import CalibrationError
from quantkit.quantizers import Gptq, Rtn
from quantkit.schemes import GgmlScheme, IntScheme
from quantkit.schemes.ggml.types import BLOCK_TYPES
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
        assert (
            float((single.stored["codes"][0] != batch.stored["codes"][index]).float().mean()) < 0.01
        )  # rounding ties only
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


@pytest.mark.parametrize("method", [Gptq(), Rtn()])
def test_rows_in_slices_give_the_same_as_all_at_once(method: Rtn | Gptq, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = problem()
    scheme = SCHEMES[0]
    whole = method.quantizer(InputStats(stats.hessian.clone(), None, stats.n_tokens))(weight, scheme)
    for name in ("SLICE_BYTES", "SHORT_SLICE_BYTES"):
        monkeypatch.setattr(f"quantkit.quantizers.batch.{name}", 7 * 4 * 128 * 3)
    slices = method.quantizer(stats)(weight, scheme)
    assert float((slices.stored["codes"] != whole.stored["codes"]).float().mean()) < 0.005
    torch.testing.assert_close(slices.relative_loss, whole.relative_loss, rtol=0.01, atol=0)


# ------------------------------------------------------------------------------------------------ block types of ggml

KINDS = tuple(BLOCK_TYPES)


def wide_problem(n: int = 3) -> tuple[torch.Tensor, InputStats]:
    """Rows of a whole super-block."""
    parts = [heavy_tailed_problem(seed, 16, 256, 600) for seed in range(n)]
    weight, hessian = (torch.stack(part) for part in zip(*parts, strict=True))
    return weight, InputStats(hessian, None, (600,) * n)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_that_is_reported_is_that_of_the_blocks(kind: str) -> None:
    """And error feedback lowers it against the search for scales alone. Float64, damped moments."""
    scheme = GgmlScheme(type=kind)  # pyright: ignore[reportArgumentType]
    weight, stats = wide_problem()
    hessian = stats.hessian.double().clone()
    damping = 0.01 * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    hessian += damping[:, None, None] * torch.eye(256, dtype=torch.float64)
    norm = loss(weight, torch.zeros_like(weight), hessian)
    rounded = Rtn().quantizer(InputStats(stats.hessian.clone(), None, stats.n_tokens))(weight, scheme)
    batch = Gptq(polish=1).quantizer(InputStats(stats.hessian.clone(), None, stats.n_tokens))(weight, scheme)
    assert batch.stored["blocks"].shape == (*weight.shape[:2], scheme.block.row_bytes(256))
    assert batch.fallbacks == ("",) * 3
    found = loss(weight, batch.decode(), hessian) / norm
    torch.testing.assert_close(batch.relative_loss.double(), found, rtol=1e-3, atol=1e-7)
    assert bool((found < 0.85 * loss(weight, rounded.decode(), hessian) / norm).all())
    # Rounding reports the loss under the importance alone, which is what it minimises.
    importance = stats.importance.double() + 0.01 * stats.importance.double().mean(-1, keepdim=True)
    diagonal = torch.diag_embed(importance)
    expected = loss(weight, rounded.decode(), diagonal) / loss(weight, torch.zeros_like(weight), diagonal)
    torch.testing.assert_close(rounded.relative_loss.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", [Rtn(), Gptq(polish=1)], ids=lambda method: method.kind)
@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q5_1", "IQ3_S"])
def test_a_batch_of_blocks_is_what_each_matrix_alone_gives(kind: str, method: Rtn | Gptq) -> None:
    scheme = GgmlScheme(type=kind)  # pyright: ignore[reportArgumentType]
    weight, stats = wide_problem()
    hessian = stats.hessian.clone()
    blocks = method.quantizer(stats)(weight, scheme).stored["blocks"]
    for index in range(3):
        alone = InputStats(hessian[index : index + 1].clone(), None, (600,))
        single = method.quantizer(alone)(weight[index : index + 1], scheme).stored["blocks"][0]
        assert float((single != blocks[index]).float().mean()) < 0.02  # rounding ties, and what follows from them


def test_heads_under_one_name_are_rows_of_one_tensor() -> None:
    """The matrices of a part: one tensor, the mean of their losses."""
    weight, stats = wide_problem()
    batch = Rtn().quantizer(stats)(weight, GgmlScheme(type="Q4_K"))
    (tensor,) = batch.tensors(("kv_b_proj.weight:k",), stats.n_tokens)
    assert torch.equal(tensor.decode(), batch.decode().flatten(0, 1))
    assert tensor.error.relative_loss == pytest.approx(float(batch.relative_loss.mean()), rel=1e-6)
    assert tensor.error.n_tokens == 600
