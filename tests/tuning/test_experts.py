"""Routed experts and latents against autograd of a plain straight-through layer in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.schemes import GgmlScheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme
from quantkit.schemes.tunable import Tunable
from quantkit.tuning.adam import BETAS, EPS, Adam
from quantkit.tuning.experts import TunedExperts, groups_of
from quantkit.tuning.latents import ONE, decode_in_torch, move, nearest_offset, update_in_torch
from quantkit.tuning.linears import FixedMatrices, Matrices, TunedMatrices

EXPERTS, HIDDEN, INTER, TOKENS, TOP_K = 5, 64, 32, 23, 2
INT4 = IntScheme(bits=4, group_size=16, scale_dtype="float32")


def activate(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def projection(out: int, into: int, generator: torch.Generator) -> tuple[Tunable, Tensor]:
    weight = torch.randn(EXPERTS, out, into, generator=generator) / into**0.5
    return INT4.tunable(INT4.rounded(weight, None, points=0, signed=False)), weight


class Seen:
    """Matrices that note the gradients which they are given."""

    moves = True

    def __init__(self, values: Tensor) -> None:
        self.values, self.gradients = values, torch.zeros_like(values)

    def weight(self, part: slice) -> Tensor:
        return self.values[part]

    def take(self, part: slice, gradient: Tensor) -> None:
        self.gradients[part] += gradient


def plain(h: Tensor, shares: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A loop over tokens."""
    rows = []
    for token in range(len(h)):
        row = torch.zeros_like(h[0])
        for slot in range(indices.shape[1]):
            e = int(indices[token, slot])
            row = row + shares[token, slot] * (down[e] @ activate(gate[e] @ h[token], up[e] @ h[token]))
        rows.append(row)
    return torch.stack(rows)


def routed(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, gate weights and experts; the last expert has no token."""
    h = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    shares = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64)
    indices = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return h.requires_grad_(), shares.requires_grad_(), indices


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_forward_and_backward(at_once: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER))
    values = [torch.randn(EXPERTS, *s, generator=generator, dtype=torch.float64) / 8 for s in shapes]
    seen = [Seen(one) for one in values]
    experts = TunedExperts(
        activate, groups_of(lambda e: tuple((one, e) for one in seen), EXPERTS, at_once), torch.float64
    )
    h, shares, indices = routed(generator)
    wanted = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)

    leaves = [one.clone().requires_grad_() for one in values]
    expected = plain(h, shares, indices, *leaves)
    into = torch.autograd.grad(expected, [h, shares, *leaves], wanted)
    found = experts(h, shares, indices)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    own = torch.autograd.grad(found, [h, shares], wanted)
    for mine, theirs in zip([*own, *(one.gradients for one in seen)], into, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_groups_follow_the_batches() -> None:
    first, second, kept = (FixedMatrices(torch.zeros(n, 1, 1)) for n in (3, 2, 5))
    places: list[tuple[Matrices, int]] = [(first, 0), (first, 1), (first, 2), (second, 0), (second, 1)]
    groups = groups_of(lambda e: (places[e], places[e], (kept, e)), 5, 2)
    assert [(one.first, one.stop) for one in groups] == [(0, 2), (2, 3), (3, 5)]
    assert [one.gate.part for one in groups] == [slice(0, 2), slice(2, 3), slice(0, 2)]
    assert [one.down.part for one in groups] == [slice(0, 2), slice(2, 3), slice(3, 5)]


def straight_through(u: Tensor, levels: Tensor) -> Tensor:
    """The level at the rounded latent; the gradient is the slope of the line between the levels around it."""
    low = u.detach().floor().clamp(0, len(levels) - 2).long()
    line = levels[low] + (u - low) * (levels[low + 1] - levels[low])
    return line + (levels[u.detach().round().clamp(0, len(levels) - 1).long()] - line).detach()


SCHEMES: dict[str, Any] = {
    "int4": INT4,
    "int3 asymmetric": IntScheme(bits=3, group_size=64, symmetric=False),
    "int8 channel": IntScheme(bits=8, group_size=None),
    "int2": IntScheme(bits=2, group_size=32, symmetric=False, scale_dtype="float16"),
    "nvfp4": Nvfp4Scheme(),
    "mxfp4": Mxfp4Scheme(),
    **{name: GgmlScheme(type=name) for name in (
        "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K",
        "Q2_0",
    )},
}  # fmt: skip


def made(scheme: Any) -> tuple[Tunable, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 3, 256, generator=generator)
    stored = scheme.rounded(weight, None, points=4, signed=True)
    tunable = scheme.tunable(stored)
    assert tunable is not None
    return tunable, weight, stored


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_view_decodes_and_stores_what_the_scheme_does(scheme: Any) -> None:
    tunable, _, stored = made(scheme)
    multiplier, addend = tunable.coefficients(tunable.parameters)
    weight = decode_in_torch(tunable.index, tunable.levels, multiplier, addend, torch.float32)
    torch.testing.assert_close(weight, scheme.decode(**stored), rtol=1e-5, atol=1e-6)
    again = tunable.stored(tunable.index, tunable.nearest(tunable.parameters))
    assert again.keys() == stored.keys()
    if scheme.label in ("NVFP4", "MXFP4"):  # which have a second zero
        assert torch.equal(scheme.decode(**again), scheme.decode(**stored))
    else:
        assert all(torch.equal(again[key], stored[key]) for key in stored)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_gradients_of_scales(scheme: Any) -> None:
    """Against autograd through the scheme's own formula, in float64."""
    tunable, original, _ = made(scheme)
    matrices = TunedMatrices(tunable, lambda number: original[number], torch.float64, adam=False)
    gradient = torch.randn(original.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrices.begin(0.0)
    index = matrices.index.clone()
    matrices.take(slice(0, 1), gradient[:1])
    matrices.take(slice(1, 2), gradient[1:])
    matrices.finish()
    changes = [torch.zeros_like(one, dtype=torch.float64, requires_grad=True) for one in tunable.parameters]
    moved = tuple(one.double() * (1 + change) for one, change in zip(tunable.parameters, changes, strict=True))
    multiplier, addend = tunable.coefficients(moved)
    level = tunable.levels.double()[index.int()].unflatten(-1, (multiplier.shape[-1], -1))
    weight = level * multiplier.unsqueeze(-1) + (0 if addend is None else addend.unsqueeze(-1))
    if changes:
        expected = torch.autograd.grad(weight.flatten(-2), changes, gradient)
        for mine, theirs in zip(matrices.changes, expected, strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad.double(), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrices.index, index)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_codes_move_against_the_gradient_of_a_straight_through_latent(scheme: Any) -> None:
    tunable, original, _ = made(scheme)
    levels, (multiplier, addend) = tunable.levels, tunable.coefficients(tunable.parameters)
    wanted = original.unflatten(-1, (multiplier.shape[-1], -1)) - (0 if addend is None else addend.unsqueeze(-1))
    scale = multiplier.unsqueeze(-1)
    wanted = torch.where(scale == 0, 0.0, wanted / torch.where(scale == 0, 1.0, scale)).flatten(-2)
    index, offset = tunable.index.clone(), nearest_offset(tunable.index, levels, wanted, 0.49)
    u = (index.double() + offset.double() / ONE).requires_grad_()
    weight = straight_through(u, levels.double()).unflatten(-1, (multiplier.shape[-1], -1)) * multiplier.unsqueeze(-1)
    gradient = torch.randn(original.shape, generator=torch.Generator().manual_seed(4))
    (at_latent,) = torch.autograd.grad(weight.flatten(-2), u, gradient.double())
    step = 0.02
    update_in_torch(index, offset, levels, multiplier, gradient, round(step * ONE))
    expected = (u.detach() - round(step * ONE) / ONE * at_latent.sign()).clamp(-0.5, len(levels) - 0.5 - 1 / ONE)
    assert torch.equal(index.double() + offset.double() / ONE, expected)
    assert bool((index != tunable.index).any())


def test_latents_start_at_the_method_s_codes_and_lean_to_the_weight() -> None:
    levels = torch.tensor([-4.0, -1.0, 0.0, 2.0])
    index = torch.tensor([[[0, 1, 2, 3, 3, 0]]], dtype=torch.uint8)
    wanted = torch.tensor([[[-9.0, -0.9, 1.0, 1.5, -1.0, -3.25]]])
    offset = nearest_offset(index, levels, wanted, 0.49).double() / ONE
    expected = torch.tensor([[[0.0, 0.1, 0.49, -0.25, -0.49, 0.25]]], dtype=torch.float64)
    torch.testing.assert_close(offset, expected, atol=1e-5, rtol=0)


def test_a_latent_carries_into_the_index() -> None:
    index = torch.tensor([[[0, 3, 7, 7]]], dtype=torch.uint8)
    offset = torch.tensor([[[-ONE // 2, ONE // 2 - 1, ONE // 2 - 1, 0]]], dtype=torch.int16)
    move(index, offset, torch.tensor([[[-5, 1, 1, -ONE]]]), 7)
    assert index.tolist() == [[[0, 4, 7, 6]]]
    assert offset.tolist() == [[[-ONE // 2, -ONE // 2, ONE // 2 - 1, 0]]]


@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("scheme", [INT4, GgmlScheme(type="Q4_K"), GgmlScheme(type="IQ4_XS")])
def test_what_is_stored_is_what_was_computed_with(scheme: Any, adam: bool) -> None:
    tunable, original, _ = made(scheme)
    matrices = TunedMatrices(tunable, lambda number: original[number], torch.float32, adam=adam)
    optimizer = Adam(matrices.changes)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        matrices.begin(0.05)
        matrices.take(slice(None), torch.randn(original.shape, generator=generator))
        matrices.finish()
        optimizer.step(0.01)
    matrices.begin(0.0)
    matrices.keep()
    computed = matrices.weight(slice(None))
    matrices.begin(0.05)
    matrices.take(slice(None), torch.randn(original.shape, generator=generator))
    matrices.restore()
    assert torch.equal(matrices.weight(slice(None)), computed)
    stored, changed = matrices.result()
    assert 0 < changed < original.numel()
    torch.testing.assert_close(scheme.decode(**stored), computed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ2_XS"])
def test_codebooks_are_left(name: str) -> None:
    scheme = GgmlScheme(type=name)  # type: ignore[arg-type]
    assert scheme.tunable(scheme.rounded(torch.randn(1, 2, 256), torch.ones(1, 256), points=0, signed=False)) is None


def test_adam_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(6)
    start = torch.randn(7, generator=generator)
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer, expected = Adam([mine]), torch.optim.Adam([theirs], lr=0.01, betas=BETAS, eps=EPS)
    for _ in range(5):
        mine.grad = torch.randn(7, generator=generator)
        theirs.grad = mine.grad.clone()
        optimizer.step(0.01)
        expected.step()
    torch.testing.assert_close(mine, theirs)
