"""One label for each position, drawn from the softmax, and the gradient of its cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantkit.arch import arch_of
from quantkit.calibrate.hidden_states import MemoryRows
from quantkit.errors import CalibrationError
from quantkit.sensitivity import head as head_module
from quantkit.sensitivity.head import SampledHead, uniform_numbers
from tests.oracles.fisher import sampled
from tests.tiny_models import random_weights, tiny_config

CPU = torch.device("cpu")
CONFIG = tiny_config(vocab_size=500)
SEED = 4


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in random_weights(CONFIG, seed=1).items()}


def hidden() -> MemoryRows:
    x = MemoryRows(3, 50, 128)
    x.write(0, torch.randn(3, 50, 128, generator=torch.Generator().manual_seed(2)))
    return x


def head_of(weights: dict[str, Tensor]) -> SampledHead:
    arch = arch_of(CONFIG)
    return SampledHead(arch, weights.__getitem__, lambda start, stop: weights[arch.lm_head][start:stop], CPU)


def test_labels_and_gradient_are_those_of_autograd(weights: dict[str, Tensor]) -> None:
    x, head = hidden(), head_of(weights)
    leaf = x.read(0, 3).clone().requires_grad_()
    logits = functional.linear(head.arch.final_hidden(head.weights, leaf.flatten(0, 1)), weights[head.arch.lm_head])
    expected = sampled(logits.detach().view(3, 50, -1), SEED)
    functional.cross_entropy(logits, expected, reduction="sum").backward()
    labels = head.backward(x, SEED)
    assert labels.equal(expected)
    assert leaf.grad is not None
    assert (x.read(0, 3) - leaf.grad).norm() <= 1e-5 * leaf.grad.norm()


def test_blocks_change_nothing(weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = hidden(), hidden()
    labels = head_of(weights).backward(whole, SEED)
    for name, size in (("VOCAB_BLOCK", 70), ("POSITIONS", 17), ("SCORED_GROUP", 50)):
        monkeypatch.setattr(head_module, name, size)
    assert head_of(weights).backward(cut, SEED).equal(labels)
    assert (whole.read(0, 3) - cut.read(0, 3)).abs().max() <= 1e-5


def test_labels_are_drawn_from_the_softmax() -> None:
    """Frequencies of 20,000 labels, where all positions have the same logits, are within four standard errors."""
    n, chances = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = chances.log().repeat(n, 1)
    drawn = uniform_numbers(SEED, n)
    labels = sampled(logits.view(1, n, 4), SEED)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    found = labels.bincount(minlength=4) / n
    assert ((found - chances).abs() <= 4 * (chances * (1 - chances) / n).sqrt()).all()


def test_seeds_draw_other_labels(weights: dict[str, Tensor]) -> None:
    head = head_of(weights)
    assert not head.backward(hidden(), SEED).equal(head.backward(hidden(), SEED + 1))


def test_broken_weights_are_a_line(weights: dict[str, Tensor]) -> None:
    broken = dict(weights)
    broken["lm_head.weight"] = weights["lm_head.weight"] * float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        head_of(broken).backward(hidden(), SEED)
