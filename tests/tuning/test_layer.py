"""Gradients of a whole V3 layer, as an update hands them on, against plain autograd of a straight-through layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.arch.base import ExpertBlock
from quantkit.calibrate.hidden_states import MemoryRows
from quantkit.errors import CalibrationError
from quantkit.plan.tune import Tune
from quantkit.schemes import IntScheme
from quantkit.tensors import Role
from quantkit.tuning.experts import TunedExperts, groups_of
from quantkit.tuning.layer import TunedLayer, TunedNorm, begin_update
from quantkit.tuning.linears import TunedMatrices
from quantkit.tuning.tune import TuneTask, metric_factor, split_rows, tune
from tests.oracles.forward import forward_layer
from tests.tiny_models import random_weights, tiny_config

CPU = torch.device("cpu")
CONFIG = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=0)
SCHEME = IntScheme(bits=3, group_size=32, scale_dtype="float32")
LAYER = 1


class Noting(TunedMatrices):
    """Notes the gradients instead of moving codes at once."""

    given: Tensor

    def begin(self, step: float) -> None:
        super().begin(step)
        self.given = torch.zeros(self.index.shape)

    def take(self, part: slice, gradient: Tensor) -> None:
        self.given[part] += gradient
        super().take(part, gradient)


def original() -> dict[str, Tensor]:
    found = {name: value.float() for name, value in random_weights(CONFIG, 3).items()}
    return {name: value * (3 if value.ndim > 1 else 1) for name, value in found.items()}


def tuned_layer(weights: dict[str, Tensor]) -> tuple[TunedLayer, dict[str, tuple[Noting, int]]]:
    """Everything in int3; experts in two batches of a projection, decoded three at a time."""
    arch = arch_of(CONFIG)
    sublayers = arch.sublayers(LAYER)
    (block,) = (b for sublayer in sublayers for b in sublayer if isinstance(b, ExpertBlock))
    placed: dict[str, tuple[Noting, int]] = {}

    def made(names: tuple[str, ...]) -> Noting:
        whole = torch.stack([weights[name] for name in names])
        stored = SCHEME.rounded(whole, None, points=0, signed=False)
        matrices = Noting(SCHEME.tunable(stored), whole.__getitem__, torch.float32, adam=False)
        placed.update((name, (matrices, place)) for place, name in enumerate(names))
        return matrices

    specs = [spec for spec in arch.tensors() if spec.layer == LAYER]
    dense = {s.name: (made((s.name,)), s.shape) for s in specs if s.linear and s.expert is None}
    moving = [one for one, _ in dense.values()]
    for names in (block.gates, block.ups, block.downs):
        moving += [made(names[:5]), made(names[5:])]
    projections = (block.gates, block.ups, block.downs)
    groups = groups_of(lambda e: tuple(placed[names[e]] for names in projections), block.n_experts, 3)
    experts = {block.name: TunedExperts(block.activate, groups, torch.float32)}
    norms = {s.name: TunedNorm(weights[s.name], torch.float32) for s in specs if s.role is Role.NORM}
    layer = TunedLayer(sublayers, dense, {}, {}, norms, experts, tuple(moving), weights.__getitem__)
    return layer, placed


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm().clamp_min(1e-12)) < 1e-4


def test_gradients() -> None:
    weights = original()
    layer, placed = tuned_layer(weights)
    generator = torch.Generator().manual_seed(4)
    x, target = (torch.randn(2, 24, 128, generator=generator) for _ in range(2))
    metric = metric_factor(torch.eye(128) + torch.ones(128, 128) / 7)

    begin_update(layer.moving, 0.0)
    decoded = {name: one.weight(slice(n, n + 1))[0].requires_grad_() for name, (one, n) in placed.items()}
    changes = {name: torch.zeros_like(weights[name], requires_grad=True) for name in layer.norms}
    moved = {name: weights[name] * (1 + change) for name, change in changes.items()}
    out = forward_layer(layer.sublayers, {**weights, **decoded, **moved}.__getitem__, x)
    loss = ((out - target) @ metric).square().mean()
    leaves = {**decoded, **changes}
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))

    step = layer.step_weights()
    with torch.enable_grad():
        own = ((layer.forward(x, step) - target) @ metric).square().mean()
        own.backward()
    step.take()
    for one in layer.moving:
        one.finish()
    torch.testing.assert_close(own, loss, rtol=1e-5, atol=0)
    for name, (one, number) in placed.items():
        theirs = expected[name]
        close(one.given[number], torch.zeros_like(one.given[number]) if theirs is None else theirs)
        if theirs is not None:  # w = level * scale: the gradient at the relative change of a scale is sum(g * w)
            scales = (theirs * decoded[name].detach()).unflatten(-1, (-1, 32)).sum(-1)
            grad = one.changes[0].grad
            assert grad is not None
            close(grad[number], scales)
    for name, norm in layer.norms.items():
        assert norm.change.grad is not None
        assert expected[name] is not None
        close(norm.change.grad, expected[name])


def stores(fill: Callable[[], Tensor], count: int) -> list[MemoryRows]:
    made = [MemoryRows(12, 16, 128) for _ in range(count)]
    for store in made:
        store.write(0, fill())
    return made


def test_the_best_epoch_is_kept_and_the_rest_is_not() -> None:
    weights = original()
    layer, _ = tuned_layer(weights)
    generator = torch.Generator().manual_seed(5)
    (x,) = stores(lambda: torch.randn(12, 16, 128, generator=generator), 1)
    target = MemoryRows(12, 16, 128)
    with torch.no_grad():
        target.write(0, forward_layer(layer.sublayers, weights.__getitem__, x.read(0, 12)))
    settings = Tune(epochs=6, lr=0.002, step_tokens=32)
    steps: list[tuple[int, int]] = []
    found = tune(TuneTask(layer, x, target, None, settings, 7, CPU), lambda done, of: steps.append((done, of)))
    assert steps == [(n, 30) for n in range(1, 31)]
    assert 0 < found.epoch <= 6
    assert found.after < found.before
    held, _ = split_rows(12)
    with torch.no_grad():
        begin_update(layer.moving, 0.0)
        own = layer.forward(x.read(0, 12)[held], layer.step_weights())
    wanted, start = (store.read(0, 12)[held] for store in (target, x))
    loss = float((own - wanted).square().sum() / (wanted - start).square().sum())
    assert abs(loss - found.after) < 1e-4 * found.after


def test_rows_that_decide() -> None:
    held, taught = split_rows(25)
    assert held.tolist() == [9, 19]
    assert sorted([*held.tolist(), *taught.tolist()]) == list(range(25))
    assert split_rows(4)[0].tolist() == [3]


def test_a_metric_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CalibrationError, match="gradients at a layer's output overflow"):
        metric_factor(torch.full((8, 8), torch.nan))
