"""What makes a group's inputs can absorb a rescaling of their channels: the model then computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from quantkit.arch.base import Block, DenseBlock, ExpertBlock, LinearRows, NormWeight, Producer
from quantkit.arch.deepseek_v3 import DeepseekV3
from tests.oracles.forward import forward_layer, logits
from tests.tiny_models import random_weights, tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "all features": {},
    "no q_lora": {"q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "dense": {"first_k_dense_replace": 3},
    "wide values": {"v_head_dim": 96, "qk_nope_head_dim": 64, "n_shared_experts": 2},
    "half-split, no yarn": {"rope_interleave": False, "rope_scaling": None, "kv_lora_rank": 64},
}


def producers(blocks: Iterable[Block]) -> Iterator[Producer]:
    for block in blocks:
        if isinstance(block, DenseBlock):
            yield from (group.producer for stage in block.stages for group in stage.groups if group.producer)
        else:
            yield from block.down_producers
            yield from [block.producer] if block.producer else []


def blocks_of(arch: DeepseekV3) -> list[Block]:
    layers = range(arch.n_layers + arch.n_mtp_layers)
    return [block for layer in layers for sublayer in arch.sublayers(layer) for block in sublayer]


def rescaled(arch: DeepseekV3, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every producer divided by powers of two, its readers' columns multiplied with them."""
    changed, generator = dict(weights), torch.Generator().manual_seed(9)
    for producer in dict.fromkeys(producers(blocks_of(arch))):
        width = weights[producer.readers[0]].shape[1]
        factors = torch.randint(-3, 4, (width,), generator=generator).float().exp2()
        changed[producer.tensor] = producer.divided(changed[producer.tensor], factors)
        for reader in producer.readers:
            changed[reader] = changed[reader] * factors
    return changed


def mtp_logits(arch: DeepseekV3, weights: dict[str, Tensor], hidden: Tensor, tokens: Tensor) -> Tensor:
    prefix = f"model.layers.{arch.n_layers}."
    embedded = embedding(tokens, weights[f"{prefix}embed_tokens.weight"])
    mtp = arch.mtp_layers()[arch.n_layers]
    x = mtp.inputs(weights.__getitem__, hidden, embedded)
    x = forward_layer(arch.sublayers(arch.n_layers), weights.__getitem__, x)
    return linear(mtp.final_hidden(weights.__getitem__, x), weights[mtp.lm_head])


@pytest.mark.parametrize("name", CONFIGS)
def test_all_producers_at_once_leave_the_logits(name: str) -> None:
    config = tiny_config(**CONFIGS[name])
    arch = DeepseekV3(config)
    weights = {key: tensor.float() for key, tensor in random_weights(config, seed=3).items()}
    changed = rescaled(arch, weights)
    tokens = torch.randint(arch.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(arch, weights.__getitem__, tokens)
    torch.testing.assert_close(logits(arch, changed.__getitem__, tokens), expected, rtol=0, atol=1e-4)
    hidden = torch.randn(2, 12, arch.hidden_size, generator=torch.Generator().manual_seed(2))
    expected = mtp_logits(arch, weights, hidden, tokens)
    torch.testing.assert_close(mtp_logits(arch, changed, hidden, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_but_the_key_part_reads_one_producer(name: str) -> None:
    """Each linear, and each router, is named once; nothing else is changed than norms and rows of linears."""
    arch = DeepseekV3(tiny_config(**CONFIGS[name]))
    found = list(dict.fromkeys(producers(blocks_of(arch))))
    readers = [reader for producer in found for reader in producer.readers]
    specs = {spec.name: spec for spec in arch.tensors()}
    routers = [spec.name for spec in specs.values() if spec.name.endswith("mlp.gate.weight")]
    assert sorted(readers) == sorted([*routers, *(spec.name for spec in specs.values() if spec.linear)])
    for producer in found:
        assert specs[producer.tensor].linear == isinstance(producer, LinearRows)
        assert len(specs[producer.tensor].shape) == (1 if isinstance(producer, NormWeight) else 2)


def test_groups_read_the_producer_that_they_name() -> None:
    """Blocks beside each other share one; a group's own linears are among the readers, parts by their whole."""
    arch = DeepseekV3(tiny_config())
    shared, routed = arch.sublayers(1)[1]
    assert isinstance(shared, DenseBlock)
    assert isinstance(routed, ExpertBlock)
    assert shared.stages[0].groups[0].producer is routed.producer
    assert routed.producer is not None
    assert routed.producer.readers[0] == "model.layers.1.mlp.gate.weight"
    assert len(routed.producer.readers) == 1 + 2 + 2 * routed.n_experts
    for block in blocks_of(arch):
        for group in (group for stage in getattr(block, "stages", ()) for group in stage.groups):
            if group.producer is not None:
                assert {name.partition(":")[0] for name in group.linears} <= set(group.producer.readers)


def test_factors_of_a_norm_leave_nothing_to_round() -> None:
    """The quotient is a bfloat16 number, and the factor is within its rounding of the wanted one; where a norm is zero
    any factor does."""
    random = torch.Generator().manual_seed(3)
    norm = torch.randn(256, generator=random).bfloat16()
    norm[7] = 0
    wanted = torch.rand(256, generator=random) + 0.5
    factors = NormWeight("norm", ("a",)).storable(wanted, {"norm": norm}.__getitem__)
    quotient = norm.float() / factors
    torch.testing.assert_close(quotient.bfloat16().float(), quotient, rtol=1e-6, atol=0)
    torch.testing.assert_close(factors, wanted, rtol=2**-8, atol=0)
    assert not torch.equal(factors, wanted)
    assert float(factors[7]) == float(wanted[7])


def test_rows_of_a_linear_take_any_factors() -> None:
    wanted = torch.tensor([0.3, 1.7])
    assert LinearRows("up", ("down",)).storable(wanted, {}.__getitem__) is wanted
