"""The compiled sweep and polish against their twins in torch. `tests.quantizers.test_ldlq` compares the compiled ones
with textbook loops; here the twins have to pass the same tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, using
from quantkit.quantizers.ldlq import factor as ldlq_factor
from quantkit.quantizers.ldlq import polish as ldlq_polish
from quantkit.quantizers.ldlq import sweep as ldlq_sweep
from quantkit.schemes import GgmlScheme, IntScheme
from quantkit.schemes.grid import Grid
from tests.quantizers import test_ldlq as textbook

Result = TypeVar("Result")


def by_twin(call: Callable[[], Result]) -> Result:
    """What a call gives without the compiled kernels."""
    with using(Backend.TORCH):
        return call()


def problem(out_features: int, in_features: int) -> tuple[Tensor, ldlq_factor.Factor]:
    parts = [textbook.heavy_tailed_problem(seed, out_features, in_features, 3 * in_features) for seed in range(2)]
    weight, hessian = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    weight[:, out_features // 2, : in_features // 2] = 0
    return weight, ldlq_factor.factorize(hessian, 0.01, act_order=True)


def int_grid(scheme: IntScheme, weight: Tensor, factor: ldlq_factor.Factor) -> Grid:
    return scheme.grid(weight, factor.hessian.diagonal(dim1=-2, dim2=-1), points=8, signed=True)


SHAPES = [(4, 32, True, 37, 288), (3, 96, False, 16, 288), (2, None, True, 5, 320), (8, 64, False, 1, 192)]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "out_features", "in_features"), SHAPES)
def test_integers_as_the_twin_chooses_them(
    bits: int,
    group_size: int | None,
    symmetric: bool,
    out_features: int,
    in_features: int,
) -> None:
    weight, factor = problem(out_features, in_features)
    scheme = IntScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    compare(int_grid(scheme, weight, factor), weight, factor)


@pytest.mark.parametrize("kind", textbook.BLOCK_TYPES)
def test_blocks_as_the_twin_chooses_them(kind: str) -> None:
    weight, factor, grid = textbook.block_problem(kind)
    compare(grid, weight, factor)


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "IQ4_NL"])
def test_rows_of_a_single_block_can_be_stored(kind: str, twin: bool) -> None:
    weight, factor = problem(16, 32)
    scheme = GgmlScheme(type=kind)  # pyright: ignore[reportArgumentType]
    grid = scheme.grid(weight, factor.hessian.diagonal(dim1=-2, dim2=-1), points=0, signed=True)

    def polished() -> ldlq_polish.Polished:
        return ldlq_polish.polish(grid, weight, ldlq_sweep.sweep(grid, weight, factor), factor.hessian, 1)

    found = by_twin(polished) if twin else polished()
    assert isinstance(found, ldlq_polish.Polished)
    decoded = scheme.decode(**grid.stored(found.codes, found.scale, found.offset))
    error = ldlq_factor.row_loss(weight - decoded, factor.hessian)
    torch.testing.assert_close(found.loss, error, rtol=1e-3, atol=1e-6)


def compare(grid: Grid, weight: Tensor, factor: ldlq_factor.Factor) -> None:
    """Equal but for rounding ties: those and what follows from them may differ in one row of 20."""
    scale, loss, twin_loss = grid.scale.clone(), torch.ones(weight.shape[:2]), torch.ones(weight.shape[:2])
    codes = ldlq_sweep.sweep(grid, weight, factor, loss)
    expected = by_twin(lambda: ldlq_sweep.sweep(grid, weight, factor, twin_loss))
    assert isinstance(expected, Tensor)
    assert rows_that_differ(codes, expected) <= 0.05
    torch.testing.assert_close(loss, twin_loss, rtol=1e-3, atol=1e-6)
    for rounds in range(3):
        found = ldlq_polish.polish(grid, weight, expected, factor.hessian, rounds)
        polished = by_twin(lambda rounds=rounds: ldlq_polish.polish(grid, weight, expected, factor.hessian, rounds))
        assert isinstance(polished, ldlq_polish.Polished)
        assert rows_that_differ(found.codes, polished.codes) <= 0.05
        torch.testing.assert_close(found.loss, polished.loss, rtol=1e-3, atol=1e-6)
        assert float(((found.scale - polished.scale).abs() > 1e-4 * polished.scale.abs()).double().mean()) < 0.02
        assert (found.offset is None) == (polished.offset is None)
        if found.offset is not None and polished.offset is not None:
            differs = (found.offset - polished.offset).abs() > 1e-4 * polished.offset.abs()
            assert float(differs.double().mean()) < 0.02
    assert torch.equal(grid.scale, scale)


def rows_that_differ(codes: Tensor, expected: Tensor) -> float:
    assert codes.dtype == expected.dtype == torch.uint8
    assert codes.shape == expected.shape
    return float((codes != expected).any(-1).double().mean())


def test_threads_change_nothing() -> None:
    weight, factor = problem(600, 256)
    grid = int_grid(IntScheme(bits=3, group_size=64), weight, factor)
    threads = torch.get_num_threads()
    found: list[tuple[Tensor, ldlq_polish.Polished]] = []
    for count in (1, 2):
        torch.set_num_threads(count)
        codes = ldlq_sweep.sweep(grid, weight, factor)
        found.append((codes, ldlq_polish.polish(grid, weight, codes, factor.hessian, 2)))
    torch.set_num_threads(threads)
    # Products of torch may differ by the number of threads, and with them a tie; the kernels' own work does not.
    assert rows_that_differ(found[0][0], found[1][0]) < 0.01
    assert rows_that_differ(found[0][1].codes, found[1][1].codes) < 0.01


@pytest.mark.parametrize("act_order", [True, False])
def test_the_twin_of_the_sweep_is_textbook_gptq(act_order: bool) -> None:
    by_twin(lambda: textbook.test_sweep_gives_the_codes_of_textbook_gptq(4, 32, 400, act_order, True))
    by_twin(lambda: textbook.test_sweep_gives_the_codes_of_textbook_gptq(2, None, 400, act_order, False))


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "MXFP4"])
def test_the_twins_on_blocks(kind: str) -> None:
    by_twin(lambda: textbook.test_sweep_on_blocks_gives_the_values_of_textbook_gptq(kind, True))
    by_twin(lambda: textbook.test_polish_on_blocks_never_raises_the_loss_and_is_stored_as_it_is(kind))


def test_the_twin_of_the_polish_ends_where_nothing_improves() -> None:
    by_twin(lambda: textbook.test_polish_ends_where_no_single_code_or_scale_improves(False, 32))
    by_twin(lambda: textbook.test_the_sweep_knows_its_loss("Q4_K"))
