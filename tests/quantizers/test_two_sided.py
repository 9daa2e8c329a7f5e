"""Rounding with output Hessians: against the definition in float64, and what must hold for every scheme."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.calibrate.inputs import InputStats
from quantkit.errors import CalibrationError
from quantkit.kernels import recorded
from quantkit.quantizers import Gptq
from quantkit.quantizers.ldlq import two_sided
from quantkit.schemes import (
    Bnb4Scheme,
    ChosenScheme,
    GgmlScheme,
    IntScheme,
    Mxfp4Scheme,
    Mxfp8Scheme,
    Nvfp4Scheme,
    W4AFp8Scheme,
)
from tests.oracles.two_sided import two_sided_codes
from tests.quantizers.test_ldlq import heavy_tailed_problem

OUT, IN, MATRICES = 72, 256, 2
SCHEMES: tuple[ChosenScheme, ...] = (
    *(IntScheme(bits=bits, group_size=64, symmetric=symmetric) for bits in (2, 4, 8) for symmetric in (True, False)),
    IntScheme(bits=3, group_size=None),
    *(GgmlScheme(type=kind) for kind in ("Q4_K", "Q3_K", "Q6_K", "Q5_1", "IQ4_XS", "IQ3_XXS", "IQ3_S", "Q2_K")),
    Nvfp4Scheme(),
    Mxfp4Scheme(),
    Mxfp8Scheme(),
    W4AFp8Scheme(),
    Bnb4Scheme(),
)


def problem(out: int = OUT, width: int = IN) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, out, in), Hessians (B, in, in) and output Hessians (B, 1, out, out)."""
    problems = [heavy_tailed_problem(seed, out, width, 900) for seed in range(MATRICES)]
    weight, hessian = (torch.stack(parts) for parts in zip(*problems, strict=True))
    output = torch.stack([heavy_tailed_problem(9 + seed, 1, out, 300)[1] for seed in range(MATRICES)])
    return weight, hessian, output.unsqueeze(1)


def factored(output: Tensor) -> two_sided.OutputFactor:
    return two_sided.factorize_output(output.clone())


def inputs(hessian: Tensor) -> InputStats:
    return InputStats(hessian.clone(), None, (900,) * len(hessian))


def damped(matrix: Tensor, share: float) -> Tensor:
    """float64, ``share`` of the mean diagonal added."""
    exact = matrix.double()
    mean = exact.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return exact + share * mean * torch.eye(exact.shape[-1], dtype=torch.float64)


def output_losses(weight: Tensor, decoded: Tensor, hessian: Tensor, output: Tensor) -> Tensor:
    """tr(H_O E H E^T) of each matrix, float64."""
    error = weight.double() - decoded.double()
    return ((output[:, 0].double() @ error @ hessian.double()) * error).sum((-2, -1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_codes_are_those_of_the_definition(rows: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sided, "rows_at_once", lambda height: rows)
    weight, hessian, output = problem(40, 96)
    scheme = IntScheme(bits=4, group_size=32, symmetric=symmetric, scale_dtype="float32")
    method = Gptq(output_aware=True, polish=0, damp_percent=0.01)
    prepared = method.prepare(inputs(hessian))
    batch = method.quantize(weight, scheme, prepared, output_factor=factored(output))
    different = 0
    for index in range(MATRICES):
        rows_by_weight = output[index, 0].diagonal().argsort().numpy()
        scale = batch.stored["scale"][index].float().repeat_interleave(32, -1).numpy()
        zero = np.full_like(scale, 8.0)
        if not symmetric:
            zero = batch.stored["zero_point"][index].float().numpy().repeat(32, -1)
        expected, margins = two_sided_codes(
            weight[index].numpy()[rows_by_weight],
            damped(hessian[index], 0.01).numpy(),
            damped(output[index, 0], two_sided.DAMPING).numpy()[np.ix_(rows_by_weight, rows_by_weight)],
            scale[rows_by_weight],
            zero[rows_by_weight],
            15,
            prepared.factor.layout[index].numpy(),
            rows,
        )
        unequal = batch.stored["codes"][index].numpy()[rows_by_weight] != expected
        # The last row that differs was rounded first of these: a tie there. All rows before it hear of it.
        for row in np.flatnonzero(unequal.any(1))[-1:]:
            order = prepared.factor.layout[index].flip(-1).numpy()
            first = np.flatnonzero(unequal[row][order])[0]
            assert margins[row][order[first]] < 1e-3
            different += 1
    assert different <= 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_outputs_that_matter_alike_change_nothing(scheme: ChosenScheme) -> None:
    weight, hessian, _ = problem()
    plain = Gptq().quantizer(inputs(hessian))(weight, scheme)
    alike = 3.0 * torch.eye(OUT).expand(MATRICES, 1, OUT, OUT)
    aware = Gptq(output_aware=True).quantizer(inputs(hessian))(weight, scheme, output_factor=factored(alike))
    assert plain.stored.keys() == aware.stored.keys()
    torch.testing.assert_close(aware.decode(), plain.decode(), rtol=0, atol=0)
    torch.testing.assert_close(aware.relative_loss, plain.relative_loss, rtol=1e-3, atol=1e-7)
    assert aware.relative_output_losses == pytest.approx(aware.relative_loss.tolist(), rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_the_output_loss_falls_and_is_what_is_reported(scheme: ChosenScheme) -> None:
    weight, hessian, output = problem()
    plain = Gptq().quantizer(inputs(hessian))(weight, scheme)
    aware = Gptq(output_aware=True).quantizer(inputs(hessian))(weight, scheme, output_factor=factored(output))
    both = damped(hessian, 0.01), damped(output, two_sided.DAMPING)
    before, after = (output_losses(weight, batch.decode(), *both) for batch in (plain, aware))
    assert float((after / before).mean()) < 0.93
    diagonal = torch.diag_embed(both[1].diagonal(dim1=-2, dim2=-1))
    relative = after / output_losses(weight, torch.zeros_like(weight), both[0], diagonal)
    assert aware.relative_output_losses == pytest.approx(relative.tolist(), rel=2e-3)
    assert plain.relative_output_losses == [None, None]


def test_blocks_of_an_output_hessian_are_matrices_of_their_own() -> None:
    """Heads, or gate and up one under the other."""
    weight, hessian, output = problem()
    scheme, method = IntScheme(bits=4, group_size=64), Gptq(output_aware=True)
    blocks = torch.stack([output[:, 0, :36, :36], 5 * output[:, 0, 36:, 36:]], 1)
    whole = method.quantizer(inputs(hessian))(weight, scheme, output_factor=factored(blocks))
    for part, own in ((slice(36), blocks[:, :1]), (slice(36, None), blocks[:, 1:])):
        alone = method.quantizer(inputs(hessian))(weight[:, part], scheme, output_factor=factored(own))
        cut = whole.rows(part.start or 0, part.stop or OUT)
        torch.testing.assert_close(cut.decode(), alone.decode(), rtol=0, atol=0)
        assert cut.relative_output_losses == pytest.approx(alone.relative_output_losses, rel=1e-4)


def test_an_output_that_never_matters_is_rounded_as_without() -> None:
    """A head, or an expert, whose gradients are all zero."""
    weight, hessian, _ = problem()
    scheme = IntScheme(bits=4, group_size=64)
    plain = Gptq().quantizer(inputs(hessian))(weight, scheme)
    none = torch.zeros(MATRICES, 1, OUT, OUT)
    aware = Gptq(output_aware=True).quantizer(inputs(hessian))(weight, scheme, output_factor=factored(none))
    torch.testing.assert_close(aware.decode(), plain.decode(), rtol=0, atol=0)
    assert all(loss is not None and np.isfinite(loss) for loss in aware.relative_output_losses)


def test_gradients_that_are_not_finite_are_refused() -> None:
    _, _, output = problem()
    output[0, 0, 2, 2] = torch.nan
    with pytest.raises(CalibrationError, match="gradients"):
        two_sided.factorize_output(output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("polish", [0, 2])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_recorded_work_stores_the_same(scheme: ChosenScheme, polish: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five slices of rows the first two run, three are replayed."""
    weight, hessian, output = (one.cuda() for one in problem(80))
    method = Gptq(output_aware=True, polish=polish)
    replayed = method.quantizer(inputs(hessian))(weight, scheme, output_factor=factored(output))
    monkeypatch.setattr(recorded, "Recorded", lambda work: work)
    run = method.quantizer(inputs(hessian))(weight, scheme, output_factor=factored(output))
    for key, values in run.stored.items():
        assert torch.equal(values.view(torch.uint8), replayed.stored[key].view(torch.uint8)), key
