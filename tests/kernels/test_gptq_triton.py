"""The Triton kernels of GPTQ against their twins in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.kernels.backend import Backend, using
from quantkit.quantizers.ldlq import factor as ldlq_factor
from quantkit.quantizers.ldlq import polish as ldlq_polish
from quantkit.quantizers.ldlq import sweep as ldlq_sweep
from quantkit.schemes import GgmlScheme, IntScheme
from quantkit.schemes.affine_int import representable
from tests.kernels.on_gpu import DEVICE, INTERPRETED, MARKS
from tests.quantizers.test_ldlq import heavy_tailed_problem

pytestmark = MARKS

SCHEMES = [
    (IntScheme(bits=4, group_size=32, scale_dtype="float16"), 160),
    (IntScheme(bits=3, group_size=40, symmetric=False, scale_dtype="float16"), 200),
    (IntScheme(bits=2, group_size=None, scale_dtype="float32"), 136),
    (GgmlScheme(type="Q4_K"), 256),
    (GgmlScheme(type="IQ4_XS"), 256),
]


def problem(in_features: int, n_tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weight (2, 40, in) and Hessian (2, in, in)."""
    parts = [heavy_tailed_problem(seed, 40, in_features, n_tokens) for seed in range(2)]
    weight, hessian = (torch.stack(part).to(DEVICE) for part in zip(*parts, strict=True))
    return weight, hessian


def plainly(hessian: Tensor) -> ldlq_factor.Factor:
    with using(Backend.TORCH):
        return ldlq_factor.factorize(hessian.clone(), 0.01, act_order=True)


@pytest.mark.parametrize(("scheme", "in_features"), SCHEMES)
def test_sweep_gives_the_twins_codes(scheme: IntScheme | GgmlScheme, in_features: int) -> None:
    from quantkit.kernels.triton import sweep as sweep_triton

    weight, hessian = problem(in_features)
    factor = plainly(hessian)
    grid = scheme.grid(weight, hessian.diagonal(dim1=-2, dim2=-1), points=8, signed=True)
    loss = weight.new_zeros(weight.shape[:2])
    codes = sweep_triton.sweep(grid, weight, factor.layout, factor.lower, factor.pivots, loss)
    with using(Backend.TORCH):
        twin = ldlq_sweep.sweep(grid, weight, factor)
    error = (weight - scheme.decode(**grid.stored(codes, grid.scale, grid.offset))).double()
    expected = ((error @ factor.hessian.double()) * error).sum(-1).float()
    torch.testing.assert_close(loss, expected, rtol=1e-3 if INTERPRETED else 2e-2, atol=0)
    if INTERPRETED:
        assert torch.equal(codes, twin)
        return
    # TF32 products between blocks: some values cross a rounding boundary, at no cost in loss.
    assert (codes != twin).float().mean() < 0.02
    losses = [ldlq_polish.polish(grid, weight, chosen, factor.hessian, 0).loss.sum() for chosen in (codes, twin)]
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=0)


@pytest.mark.parametrize(("scheme", "in_features"), SCHEMES)
def test_polish_ends_where_its_twin_does(scheme: IntScheme | GgmlScheme, in_features: int) -> None:
    from quantkit.kernels.triton import polish as polish_triton

    weight, hessian = problem(in_features)
    factor = plainly(hessian)
    grid = scheme.grid(weight, hessian.diagonal(dim1=-2, dim2=-1), points=8, signed=True)
    with using(Backend.TORCH):
        codes = ldlq_sweep.sweep(grid, weight, factor)
        twin = ldlq_polish.polish(grid, weight, codes, factor.hessian, 1)
    moved = ldlq_polish.Polished(*polish_triton.polish(grid, weight, codes, factor.hessian, 1))
    assert (moved.codes != twin.codes).float().mean() <= 0.02
    torch.testing.assert_close(moved.loss.sum(), twin.loss.sum(), rtol=2e-2, atol=0)
    stored = grid.stored(moved.codes, moved.scale, moved.offset)
    error = (weight - scheme.decode(**stored)).double()
    loss = ((error @ factor.hessian.double()) * error).sum(-1).float()
    # From bfloat16 factors, of which a row has few here.
    torch.testing.assert_close(moved.loss, loss, rtol=4e-2, atol=0)


@pytest.mark.parametrize("in_features", [136, 384])
def test_products_with_the_inverse(in_features: int) -> None:
    from quantkit.kernels.triton import solve as solve_triton

    weight, hessian = problem(in_features)
    factor = plainly(hessian)
    moved = weight.flip(1)
    found = solve_triton.add_times_inverse(weight, moved, factor.layout, factor.lower, factor.pivots, 0.5)
    added = 0.5 * torch.linalg.solve(factor.hessian.double(), moved.double().mT).mT
    assert (found - weight - added).norm() < (1e-4 if INTERPRETED else 2e-2) * added.norm()


@pytest.mark.parametrize("in_features", [200, 1300])
def test_loss_by_row(in_features: int) -> None:
    from quantkit.kernels.triton import row_loss as row_loss_triton

    error, hessian = problem(in_features)
    exact = ((error.double() @ hessian.double()) * error.double()).sum(-1)
    found = row_loss_triton.row_loss(error, hessian).double()
    torch.testing.assert_close(found.sum(), exact.sum(), rtol=2e-3, atol=0)
    torch.testing.assert_close(found, exact, rtol=3e-2, atol=0)


@pytest.mark.parametrize(("n", "count"), [(200, 2), (456, 3), (200, 1)])
def test_cholesky(n: int, count: int) -> None:
    from quantkit.kernels.triton import factor as cholesky_triton

    _, hessian = problem(n, 150)  # fewer tokens than inputs
    hessian = hessian[torch.arange(count) % 2]
    hessian += 0.01 * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(n, device=DEVICE)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(-1)
    lower = cholesky_triton.permuted(hessian, order)
    for index, one in enumerate(hessian):
        assert torch.equal(lower[index].tril(), one[order[index]][:, order[index]].tril())
    exact = torch.linalg.cholesky(
        torch.stack([one[to][:, to] for one, to in zip(hessian, order, strict=True)]).double()
    )
    cholesky_triton.cholesky_(lower, tf32=False)
    torch.testing.assert_close(lower.tril().double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
    lower[:, 70, 70] = -1.0
    cholesky_triton.cholesky_(lower, tf32=False)
    assert bool(lower.diagonal(dim1=-2, dim2=-1).isnan().any(-1).all())


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "signed"),
    [(4, 32, True, True), (4, 32, True, False), (2, 32, True, True), (3, 48, False, True), (8, None, True, True)],
)
def test_scale_search_finds_scales_as_good_as_the_twins(
    bits: int, group_size: int | None, symmetric: bool, signed: bool
) -> None:
    from quantkit.kernels.triton import scale_search as scale_search_triton

    weight, hessian = problem(96)
    weight[0, 0] = 0.0
    weight[1, 3].abs_()
    importance = hessian.diagonal(dim1=-2, dim2=-1)
    scheme = IntScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    n_groups, points = scheme.n_groups(96), 20
    with using(Backend.TORCH):
        twin, twin_zero = scheme.fit(weight, importance, grid=points, signed=signed)
    smallest = {2: 0.3, 3: 0.45, 4: 0.6, 8: 0.8}[bits]
    fractions = torch.linspace(smallest, 1.0, points).to(DEVICE)
    scale, zero = scale_search_triton.search(
        weight, importance, fractions, n_groups=n_groups, bits=bits, symmetric=symmetric, signed=signed
    )
    assert (zero is None) == (twin_zero is None) == symmetric
    if zero is not None and twin_zero is not None:
        assert torch.equal(zero, twin_zero.float())
        zero = zero.byte()

    def error(scale: Tensor, zero: Tensor | None) -> Tensor:
        wrong = scheme.decode(scheme.encode(weight, scale, zero), scale, zero) - weight
        return (wrong.square() * importance[:, None]).sum()

    # At the whole range the largest weight lies half between two levels: division and multiplication by the inverse may
    # part there. With eight bits many candidates are as good as one another.
    scale = representable(scheme, scale)
    assert ((scale - twin).abs() > 1e-5 * twin.abs()).float().mean() < (0.15 if bits < 8 else 0.5)
    torch.testing.assert_close(error(scale, zero), error(twin, twin_zero), rtol=2e-2, atol=0)


@pytest.mark.parametrize("width", [5, 1024, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_added_times_their_shares(width: int, dtype: torch.dtype) -> None:
    from quantkit.kernels.triton.scatter import add_rows_

    generator = torch.Generator().manual_seed(1)
    matrix, values = (torch.randn(n, width, generator=generator).to(DEVICE) for n in (7, 3))
    shares, rows, values = torch.tensor([0.5, 0, -2.0], device=DEVICE), torch.tensor([0, 4, 6]), values.to(dtype)
    expected = matrix.index_add(0, rows.to(DEVICE), values.float() * shares[:, None])
    add_rows_(matrix, rows.to(DEVICE), values, shares)
    torch.testing.assert_close(matrix, expected)
    add_rows_(matrix, rows[:0].to(DEVICE), values[:0], shares[:0])
    torch.testing.assert_close(matrix, expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no bfloat16 products")
def test_moments() -> None:
    from quantkit.kernels.triton import moments as moments_triton

    x = torch.randn(300, 328, device=DEVICE).bfloat16()
    sums = torch.zeros(328, 328, device=DEVICE)
    for half in x.split(170):
        moments_triton.add_squares_(sums, half, 0.5)
    assert torch.equal(sums, sums.T)
    torch.testing.assert_close(sums.double(), 0.5 * (x.double().T @ x.double()), rtol=0, atol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="nothing is dispatched in the interpreter")
def test_the_package_takes_the_kernels_on_a_gpu() -> None:
    weight, hessian = problem(256)
    scheme = IntScheme(bits=4, group_size=64)
    factor = ldlq_factor.factorize(hessian.clone(), 0.01, act_order=True)
    grid = scheme.grid(weight, hessian.diagonal(dim1=-2, dim2=-1), points=40, signed=True)
    polished = ldlq_polish.polish(grid, weight, ldlq_sweep.sweep(grid, weight, factor), factor.hessian, 2)
    on_cpu = ldlq_factor.factorize(hessian.cpu(), 0.01, act_order=True)
    grid = scheme.grid(weight.cpu(), hessian.cpu().diagonal(dim1=-2, dim2=-1), points=40, signed=True)
    twin = ldlq_polish.polish(grid, weight.cpu(), ldlq_sweep.sweep(grid, weight.cpu(), on_cpu), on_cpu.hessian, 2)
    torch.testing.assert_close(polished.loss.sum().cpu(), twin.loss.sum(), rtol=1e-2, atol=0)
