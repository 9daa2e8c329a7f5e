"""The blocked, batched float32 sweep against the float64 textbook loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.quantizers.ldlq import factor as ldlq_factor
from quantkit.quantizers.ldlq import polish as ldlq_polish
from quantkit.quantizers.ldlq import sweep as ldlq_sweep
from quantkit.schemes import GgmlScheme, IntScheme
from quantkit.schemes.affine_int import IntGrid
from quantkit.schemes.ggml.scheme import BlockGrid
from tests.oracles.gptq import gptq_codes, gptq_values


def heavy_tailed_problem(
    seed: int, out_features: int, in_features: int, n_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and Hessian (in, in) of correlated inputs with a few outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    inputs = torch.randn(n_tokens, in_features, generator=generator) @ mixing
    inputs[:, :: in_features // 4] *= 8
    inputs *= torch.randn(n_tokens, 1, generator=generator).exp()
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight, inputs.T @ inputs / n_tokens


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "n_tokens"), [(4, 32, 400), (3, 64, 400), (2, None, 400), (4, 32, 40)])
def test_sweep_gives_the_codes_of_textbook_gptq(
    bits: int, group_size: int | None, n_tokens: int, act_order: bool, symmetric: bool
) -> None:
    scheme = IntScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    problems = [heavy_tailed_problem(seed, 48, 192, n_tokens) for seed in range(3)]
    weight, hessian = (torch.stack(parts) for parts in zip(*problems, strict=True))
    factor = ldlq_factor.factorize(hessian.clone(), 0.01, act_order=act_order)
    grid = scheme.grid(weight, torch.diagonal(hessian, dim1=-2, dim2=-1), points=40, signed=True)
    scale, zero = grid.scale, grid.zero_point
    codes = ldlq_sweep.sweep(grid, weight, factor)
    assert factor.damping == 1.0
    different = 0
    for index in range(3):
        repeats = 192 // scale.shape[-1]
        zeros = torch.full_like(scale, 2.0 ** (bits - 1)) if zero is None else zero.float()
        expected, margins = gptq_codes(
            weight[index].numpy(),
            factor.hessian[index].numpy(),
            scale[index].repeat_interleave(repeats, -1).numpy(),
            zeros[index].repeat_interleave(repeats, -1).numpy(),
            2**bits - 1,
            factor.layout[index].flip(-1).numpy(),
        )
        unequal = codes[index].numpy() != expected
        # A row follows the oracle until its first rounding tie; what comes later in that row may differ in consequence.
        for row in np.flatnonzero(unequal.any(1)):
            processed = factor.layout[index].flip(-1).numpy()
            first = np.flatnonzero(unequal[row][processed])[0]
            assert margins[row][processed[first]] < 1e-3
            different += 1
    assert different <= 3  # of 144 rows


def test_target_follows_the_original_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(500, 64, generator=generator)
    original = seen + 0.3 * torch.randn(500, 64, generator=generator) + 0.1 * seen.roll(1, 1)
    weight = torch.randn(1, 32, 64, generator=generator)
    factor = ldlq_factor.factorize((seen.T @ seen / 500)[None].clone(), 1e-6, act_order=True)
    cross = ((original - seen).T @ seen / 500)[None]
    target = ldlq_factor.towards_original(weight, cross, factor, 1.0)[0]
    best = torch.linalg.lstsq(seen.double(), original.double() @ weight[0].T.double()).solution.T
    torch.testing.assert_close(target.double(), best, rtol=1e-3, atol=1e-3)


def test_damping_is_raised_and_reported_when_rounding_makes_a_pivot_negative() -> None:
    vector = torch.linspace(1, 2, 96)
    hessian = torch.outer(vector, vector)[None] * 1e6
    factor = ldlq_factor.factorize(hessian - 0.2 * torch.diag(vector * 1e6)[None], 1e-3, act_order=False)
    assert factor.damping > 1
    assert bool((factor.pivots > 0).all())


def test_storage_order_takes_the_damping_that_it_needs() -> None:
    """How much that is depends on the machine's rounding; each order says what it took, and what it factored."""
    generator = torch.Generator().manual_seed(50)
    x = torch.randn(64, 256, generator=generator)
    count = int(torch.randint(1, 6, (1,), generator=generator))
    x[:, torch.randint(0, 256, (count,), generator=generator)] *= 10 ** float(torch.rand(1, generator=generator) * 4)
    x = x + x[:, :1] * float(torch.rand(1, generator=generator) * 3)
    factor = ldlq_factor.factorize((x.T @ x / 64)[None], 1e-6, act_order=True)
    again = ldlq_factor.in_storage_order(factor, 1e-6)
    assert again.damping >= factor.damping >= 1
    unit = again.lower[0].tril(-1) + torch.eye(256)
    rebuilt = (unit * again.pivots[0]) @ unit.T
    torch.testing.assert_close(rebuilt, again.hessian[0].flip(0, 1), rtol=1e-4, atol=1e-3 * float(again.pivots.mean()))


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_polish_ends_where_no_single_code_or_scale_improves(symmetric: bool, group_size: int | None) -> None:
    scheme = IntScheme(bits=3, group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    weight, hessian = heavy_tailed_problem(3, 24, 160, 400)
    factor = ldlq_factor.factorize(hessian[None].clone(), 0.01, act_order=True)
    exact = factor.hessian.double()
    grid = scheme.grid(weight[None], hessian.diagonal()[None], points=40, signed=True)
    scale, zero = grid.scale, grid.zero_point
    codes = ldlq_sweep.sweep(grid, weight[None], factor)

    def loss(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        error = (weight[None] - scheme.decode(codes, scale, zero)).double()
        return ((error @ exact) * error).sum(-1)

    before = loss(codes, scale)
    for _ in range(20):
        polished = ldlq_polish.polish(IntGrid(scheme, scale, zero), weight[None], codes, factor.hessian, 1)
        codes, scale, claimed = polished.codes, polished.scale, polished.loss
        after = loss(codes, scale)
        torch.testing.assert_close(claimed.double(), after, rtol=1e-3, atol=0)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    for column in range(160):
        for step in (-1, 1):
            changed = codes.clone()
            changed[..., column] = (changed[..., column].int() + step).clamp(0, 7).byte()
            assert bool((loss(changed, scale) >= before * (1 - 1e-5)).all())
    for group in range(scale.shape[-1]):
        for factor_ in (0.99, 1.01):
            changed_scale = scale.clone()
            changed_scale[..., group] *= factor_
            assert bool((loss(codes, changed_scale) >= before * (1 - 1e-4)).all())


# --------------------------------------------------------------------------------------------- block types of ggml


BLOCK_TYPES = ("Q4_K", "Q3_K", "Q6_K", "Q4_0", "Q5_1", "Q2_K", "IQ4_NL", "IQ4_XS", "MXFP4")
WIDTH, ROWS, MATRICES = 512, 12, 2


def block_problem(kind: str, *, act_order: bool = True) -> tuple[torch.Tensor, ldlq_factor.Factor, BlockGrid]:
    """Targets (B, out, in), factor, and a grid of fitted scales. A row of zeros and a row that is zero in its first
    block are among them: groups without extent."""
    problems = [heavy_tailed_problem(seed, ROWS, WIDTH, 900) for seed in range(MATRICES)]
    weight, hessian = (torch.stack(parts) for parts in zip(*problems, strict=True))
    weight[:, 3] = 0
    weight[:, 5, :256] = 0
    factor = ldlq_factor.factorize(hessian, 0.01, act_order=act_order)
    importance = factor.hessian.diagonal(dim1=-2, dim2=-1)
    return weight, factor, GgmlScheme(type=kind).grid(weight, importance, points=0, signed=True)  # pyright: ignore[reportArgumentType]


def allowed_values(grid: BlockGrid) -> torch.Tensor:
    """(B, out, in, n) float64: by ggml's formula scale * level + offset, from what the blocks will store."""
    kind, params = grid.kind, grid.params
    levels = torch.tensor(sorted(set(kind.levels)), dtype=torch.float64)

    def by_weight(values: torch.Tensor) -> torch.Tensor:
        return values.double().repeat_interleave(WIDTH // values.shape[-1], -1)

    scale = by_weight(params.d)
    if params.sub_scale is not None:
        scale = scale * by_weight(params.sub_scale)
    values = scale[..., None] * levels
    if params.dmin is not None:
        low = by_weight(params.dmin)
        values = values + (low if params.sub_min is None else -low * by_weight(params.sub_min))[..., None]
    return values


def values_of(grid: BlockGrid, codes: torch.Tensor) -> torch.Tensor:
    return allowed_values(grid).gather(-1, codes.long()[..., None])[..., 0]


@pytest.mark.parametrize(
    ("kind", "act_order"), [*((kind, True) for kind in BLOCK_TYPES), ("Q4_K", False), ("IQ4_XS", False)]
)
def test_sweep_on_blocks_gives_the_values_of_textbook_gptq(kind: str, act_order: bool) -> None:
    weight, factor, grid = block_problem(kind, act_order=act_order)
    found = values_of(grid, ldlq_sweep.sweep(grid, weight, factor)).numpy()
    allowed = allowed_values(grid).numpy()
    different = 0
    for index in range(MATRICES):
        order = factor.layout[index].flip(-1).numpy()
        expected, margins = gptq_values(weight[index].numpy(), factor.hessian[index].numpy(), allowed[index], order)
        unequal = found[index] != expected
        for row in np.flatnonzero(unequal.any(1)):
            first = np.flatnonzero(unequal[row][order])[0]
            assert margins[row][order[first]] < 2e-3
            different += 1
    assert different <= 3  # of 24 rows
    assert np.abs(found[:, 3]).max() < 1e-6


def loss_by_row(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(E H E^T) in float64."""
    error = weight.double() - values.double()
    return ((error @ hessian.double()) * error).sum(-1)


def polished_values(grid: BlockGrid, polished: ldlq_polish.Polished) -> torch.Tensor:
    """scale * level + offset of what polish chose, float64."""
    levels = torch.tensor(sorted(set(grid.kind.levels)), dtype=torch.float64)[polished.codes.long()]
    scale, offset = (
        0.0 if values is None else values.double().repeat_interleave(grid.kind.group, -1)
        for values in (polished.scale, polished.offset)
    )
    return scale * levels + offset


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_polish_on_blocks_never_raises_the_loss_and_is_stored_as_it_is(kind: str) -> None:
    """What polish claims is the loss of what the file decodes to, round by round."""
    weight, factor, grid = block_problem(kind)
    scheme = GgmlScheme(type=kind)  # pyright: ignore[reportArgumentType]
    codes = ldlq_sweep.sweep(grid, weight, factor)
    before = loss_by_row(weight, values_of(grid, codes), factor.hessian)
    swept = before
    for rounds in range(3):
        polished = ldlq_polish.polish(grid, weight, codes, factor.hessian, rounds)
        stored = grid.stored(polished.codes, polished.scale, polished.offset)
        decoded = scheme.decode(**stored)
        torch.testing.assert_close(decoded.double(), polished_values(grid, polished), rtol=1e-6, atol=1e-7)
        after = loss_by_row(weight, decoded, factor.hessian)
        torch.testing.assert_close(polished.loss.double(), after, rtol=1e-3, atol=1e-6)
        assert bool((after <= before * (1 + 1e-5) + 1e-9).all())
        before = after
    assert float(before.sum()) < 0.98 * float(swept.sum())


@pytest.mark.parametrize("name", ["int4", "Q4_K"])
def test_the_sweep_knows_its_loss(name: str) -> None:
    """sum D (w' - q)^2 is tr(E H E^T), whatever the order of the columns."""
    scheme = IntScheme(bits=4, group_size=32) if name == "int4" else GgmlScheme(type="Q4_K")
    weight, hessian = heavy_tailed_problem(3, 24, 256, 600)
    factor = ldlq_factor.factorize(hessian[None].clone(), 0.01, act_order=True)
    grid = scheme.grid(weight[None], factor.hessian.diagonal(dim1=-2, dim2=-1), points=8, signed=True)
    loss = torch.ones(1, 24)
    codes = ldlq_sweep.sweep(grid, weight[None], factor, loss)
    error = (weight - scheme.decode(**grid.stored(codes, grid.scale, grid.offset))[0]).double()
    expected = ((error @ factor.hessian[0].double()) * error).sum(-1)
    torch.testing.assert_close(loss[0].double() - 1, expected, rtol=1e-3, atol=1e-6)
