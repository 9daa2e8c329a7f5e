"""kv_b_proj in the two parts that llama.cpp stores: how it is cut, put together again, and what each part reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, Stage
from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.parts import in_parts, stored_tensors
from tests.arch.test_deepseek_v3 import ROOT
from tests.tiny_models import random_weights, tiny_config

Lookup = Callable[[str], Tensor]
CONFIGS: dict[str, dict[str, Any]] = {
    "q_lora": {},
    "no q_lora": {"q_lora_rank": None},
    "wide values": {"v_head_dim": 96, "qk_nope_head_dim": 64},
    "narrow values": {"v_head_dim": 16, "kv_lora_rank": 64},
}


def model(changes: dict[str, Any]) -> tuple[DeepseekV3, Lookup]:
    config = tiny_config(**changes)
    weights = {name: tensor.float() for name, tensor in random_weights(config, seed=4).items()}
    return DeepseekV3(config), weights.__getitem__


def key_stage(arch: DeepseekV3, layer: int) -> Stage:
    """The stage whose only group is the key part."""
    (attention,) = arch.sublayers(layer)[0]
    assert isinstance(attention, DenseBlock)
    (found,) = (s for s in attention.stages if any(name.endswith(":k") for g in s.groups for name in g.linears))
    assert [group.linears for group in found.groups] == [(f"model.layers.{layer}.self_attn.kv_b_proj.weight:k",)]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_are_the_whole_and_nothing_twice(name: str) -> None:
    arch, weights = model(CONFIGS[name])
    c, parts = arch.config, arch.parts()
    wholes = [spec for spec in arch.tensors() if spec.name.endswith("kv_b_proj.weight")]
    assert list(parts) == [f"{spec.name}:{part}" for spec in wholes for part in "kv"]
    assert {spec.layer for spec in wholes} == set(range(arch.n_layers + arch.n_mtp_layers))
    for spec in wholes:
        whole = weights(spec.name)
        again = torch.full_like(whole, torch.nan)
        for part in (parts[f"{spec.name}:k"], parts[f"{spec.name}:v"]):
            taken = part.take(whole)
            assert (part.whole, part.shape) == (spec.name, tuple(taken.shape))
            assert taken.is_contiguous()
            free = again.isnan().sum()
            part.put(again, taken)
            assert int(free - again.isnan().sum()) == taken.numel()  # nothing of the other part is touched
        assert torch.equal(again, whole)
        width = c.qk_nope_head_dim + c.v_head_dim
        keys, values = parts[f"{spec.name}:k"].take(whole), parts[f"{spec.name}:v"].take(whole)
        for head in range(c.num_attention_heads):
            rows = whole[head * width : (head + 1) * width]
            assert torch.equal(keys[head], rows[: c.qk_nope_head_dim].T)
            assert torch.equal(values[head], rows[c.qk_nope_head_dim :])


def test_shapes_of_v3() -> None:
    config = json.loads((ROOT / "examples" / "deepseek-v3-671b" / "config.json").read_text(encoding="utf-8"))
    parts = DeepseekV3(config).parts()
    assert len(parts) == 2 * 62
    shapes = {part.name[-1]: part.shape for part in parts.values()}
    assert shapes == {"k": (128, 512, 128), "v": (128, 128, 512)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_key_part_reads_the_queries_of_each_head(name: str, layer: int) -> None:
    """A plain loop over tokens and heads in float64; norms, q_a and q_b (or q) are all that is asked for."""
    arch, weights = model(CONFIGS[name])
    c = arch.config
    x = torch.randn(2, 5, c.hidden_size, generator=torch.Generator().manual_seed(6))
    asked: list[str] = []

    def lookup(tensor: str) -> Tensor:
        asked.append(tensor.rpartition("self_attn.")[2])
        return weights(tensor)

    (found,) = key_stage(arch, layer).inputs(lookup, x)
    lora = {"q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"}
    assert set(asked) == {f"model.layers.{layer}.input_layernorm.weight"} | (
        lora if c.q_lora_rank else {"q_proj.weight"}
    )

    def weight(short: str) -> Tensor:
        return weights(f"model.layers.{layer}.{short}.weight").double()

    def norm(row: Tensor, scale: Tensor, eps: float) -> Tensor:
        return row / (row.square().mean() + eps).sqrt() * scale

    width = c.qk_nope_head_dim + c.qk_rope_head_dim
    expected = torch.empty(found.shape, dtype=torch.float64)
    for token, row in enumerate(x.flatten(0, 1).double()):
        h = norm(row, weight("input_layernorm"), c.rms_norm_eps)
        if c.q_lora_rank:
            latent = norm(weight("self_attn.q_a_proj") @ h, weight("self_attn.q_a_layernorm"), 1e-6)
            queries = weight("self_attn.q_b_proj") @ latent
        else:
            queries = weight("self_attn.q_proj") @ h
        for head in range(c.num_attention_heads):
            expected[head, token] = queries[head * width : head * width + c.qk_nope_head_dim]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_scores_and_values_by_the_parts_are_those_of_the_whole() -> None:
    """llama.cpp takes a query into the latent space and multiplies there; so the key part's inputs are the queries."""
    arch, weights = model(CONFIGS["wide values"])
    c, parts = arch.config, arch.parts()
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    x = torch.randn(1, 9, c.hidden_size, generator=torch.Generator().manual_seed(6))
    (queries,) = key_stage(arch, 1).inputs(weights, x)
    latents = torch.randn(9, c.kv_lora_rank, generator=torch.Generator().manual_seed(7))
    both = (latents @ weights(name).T).view(9, c.num_attention_heads, -1)
    keys, values = both[..., : c.qk_nope_head_dim], both[..., c.qk_nope_head_dim :]
    key_part, value_part = (parts[f"{name}:{part}"].take(weights(name)) for part in "kv")
    by_parts = (queries @ key_part.mT) @ latents.T  # (heads, queries, latents)
    torch.testing.assert_close(by_parts, torch.einsum("hqn,khn->hqk", queries, keys), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((latents @ value_part.mT).transpose(0, 1), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_stacks_experts_and_nothing_else(name: str) -> None:
    """Every weight is in one stored tensor, and a stored tensor holds experts or heads or is a tensor of its own."""
    arch, _ = model(CONFIGS[name])
    specs = in_parts(arch)
    stored = stored_tensors(specs, arch.gguf())
    assert sum(math.prod(tensor.shape) for tensor in stored.values()) == sum(math.prod(s.shape) for s in arch.tensors())
    experts = {tensor.name for tensor in stored.values() if tensor.stacked}
    assert experts == {f"blk.{layer}.ffn_{kind}_exps.weight" for layer in (1, 2, 3) for kind in ("gate", "up", "down")}
    for tensor in stored.values():
        assert tensor.shape == ((12, *tensor.first.shape) if tensor.stacked else tensor.first.shape)
        heads = arch.config.num_attention_heads if tensor.first.part_of else 1
        assert tensor.n_matrices == (12 if tensor.stacked else heads)
    told = stored_tensors(specs, arch.gguf(), n_experts=7)
    assert {tensor.shape[0] for tensor in told.values() if tensor.stacked} == {7}
