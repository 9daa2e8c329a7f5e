"""AWQ's search for factors: against the float64 oracle, and where there is little to go by."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantkit.arch.base import NormWeight
from quantkit.calibrate.inputs import InputImportance
from quantkit.quantizers import Awq, Gptq, Rtn
from quantkit.quantizers.rescaling import ChannelReader, Channels
from quantkit.schemes import ChosenScheme, GgmlScheme, IntScheme
from tests.oracles.awq import Linear, best_factors

INT4, INT3, Q4_0 = IntScheme(bits=4, group_size=32), IntScheme(bits=3, group_size=64), GgmlScheme(type="Q4_0")


def heavy(seed: int, *shape: int) -> Tensor:
    """Numbers of which a few columns are much larger."""
    random = torch.Generator().manual_seed(seed)
    columns = torch.randn(shape[-1], generator=random).exp()
    return torch.randn(shape, generator=random) * columns


def importance(seed: int, count: int, width: int = 64) -> Tensor:
    return heavy(seed, count, width).square() + 0.01


def channels_of(inputs: InputImportance, *readers: ChannelReader) -> Channels:
    """Each call of ``readers`` begins anew."""
    producers = tuple(NormWeight(f"norm {i}", (f"linear {i}",)) for i in range(len(inputs.importance)))

    def begun() -> Iterator[ChannelReader]:
        return iter(readers)

    return Channels(producers, inputs, begun)


def read(scheme: ChosenScheme, weight: Tensor, own: Tensor, *tokens: int) -> ChannelReader:
    return ChannelReader(scheme, weight, InputImportance(own, tokens))


def test_one_scale_for_all_that_read_a_norm_is_the_oracles() -> None:
    """A shared expert over all tokens, and three experts of another scheme over their own."""
    pooled, own = importance(0, 1), importance(1, 3)
    shared, experts = heavy(2, 1, 24, 64), heavy(3, 3, 16, 64)
    channels = channels_of(
        InputImportance(pooled, (900,)),
        read(INT4, shared, pooled, 900),
        read(INT3, experts, own, 400, 20, 0),
    )
    linears = [Linear(shared[0], INT4, pooled[0], 900)]
    linears += [Linear(experts[i], INT3, own[i], tokens) for i, tokens in enumerate((400, 20, 0))]
    expected, loss, without = best_factors(pooled[0], linears, grid=4)
    assert loss < 0.95 * without
    found = Awq(grid=4).rescale(channels)
    assert found.shape == (1, 64)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", [INT4, IntScheme(bits=4, group_size=32, symmetric=False), Q4_0], ids=str)
def test_hidden_units_have_a_scale_for_each_expert(scheme: ChosenScheme) -> None:
    own, downs = importance(4, 3), heavy(5, 3, 16, 64)
    channels = channels_of(InputImportance(own, (50, 60, 70)), read(scheme, downs, own, 50, 60, 70))
    found = Awq(grid=4).rescale(channels)
    for number, tokens in enumerate((50, 60, 70)):
        expected, _, _ = best_factors(own[number], [Linear(downs[number], scheme, own[number], tokens)], grid=4)
        torch.testing.assert_close(found[number].double(), expected, rtol=1e-4, atol=0)


def test_an_expert_without_tokens_stays_as_it_is() -> None:
    own, downs = importance(6, 2), heavy(7, 2, 16, 64)
    own[1] = 0
    found = Awq().rescale(channels_of(InputImportance(own, (50, 0)), read(INT4, downs, own, 50, 0)))
    assert torch.equal(found[1], torch.ones(64))
    assert not torch.equal(found[0], torch.ones(64))


def test_dead_channels_keep_weights_that_other_text_may_need() -> None:
    """An input that never fired, and a column of zeros: factors stay within a bound, and so does the rounding error."""
    own, weight = importance(8, 1), heavy(9, 1, 32, 64)
    own[:, 5] = 0
    weight[:, :, 9] = 0
    factors = Awq().rescale(channels_of(InputImportance(own, (100,)), read(INT4, weight, own, 100)))
    assert bool((factors > 0).all())
    assert float(factors.max() / factors.min()) < 1e4
    batch = Rtn().quantizer(InputImportance(own / factors.square(), (100,)))(weight * factors.unsqueeze(1), INT4)
    error = (batch.decode() / factors.unsqueeze(1) - weight)[0, :, 5].norm() / weight[0, :, 5].norm()
    assert float(error) < 0.5


def test_weights_in_bfloat16_are_read_as_they_are() -> None:
    own, weight = importance(10, 1), heavy(11, 1, 32, 64).bfloat16()
    kept = weight.clone()
    found, wide = (
        Awq().rescale(channels_of(InputImportance(own, (100,)), read(INT4, given, own, 100)))
        for given in (weight, weight.float())
    )
    assert torch.equal(found, wide)
    assert torch.equal(weight, kept)


def test_then_is_a_method_or_its_name() -> None:
    assert Awq.model_validate({"then": "gptq"}) == Awq(then=Gptq())
    assert Awq() == Awq(then=Rtn())
    gptq, rtn = Awq(then=Gptq(cross=0.25, shrink=1)), Awq()
    assert (gptq.needs_inputs, gptq.needs_hessian, gptq.follows_original, gptq.shrinkage) == (True, True, True, (1, 1))
    assert (rtn.needs_inputs, rtn.needs_hessian, rtn.follows_original, rtn.shrinkage) == (True, False, False, (0, 0))
