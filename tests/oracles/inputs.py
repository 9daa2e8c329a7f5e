"""What every matrix of a DeepSeek V3 reads, as llama.cpp cuts the model: sums of squares in plain float64.

Latents, norms and the queries of each head are computed here from the papers' formulas. Attention contexts, routing and
the way through a layer come from the family's blocks, which have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from quantkit.arch import arch_of
from quantkit.arch.base import DenseBlock, ExpertBlock
from tests.oracles import forward

Weights = Callable[[str], Tensor]
Sums = dict[str, tuple[Tensor, list[int]]]
"""GGUF weight name -> sums of squares (matrices, in) float64, tokens of each matrix (heads share theirs)."""


def input_sums(config: Mapping[str, Any], weights: Weights, embedded: Tensor) -> Sums:
    """embedded (rows, tokens, hidden): run it through all decoder layers with ``weights`` (float32)."""
    arch, x, sums = arch_of(config), embedded, Sums()
    for layer in range(arch.n_layers):
        attention, *_ = (block for sublayer in arch.sublayers(layer) for block in sublayer)
        assert isinstance(attention, DenseBlock)
        for name, values in attention_inputs(config, weights, layer, x).items():
            add(sums, f"blk.{layer}.{name}.weight", values)
        (context,) = attention.stages[-1].inputs(weights, x)
        add(sums, f"blk.{layer}.attn_output.weight", context)
        x = x + (context @ weights(attention.output).T).view_as(x)
        after = x
        for block in arch.sublayers(layer)[1]:
            if isinstance(block, ExpertBlock):
                experts(block, weights, layer, x, sums)
            else:
                dense(config, weights, layer, block, x, sums)
            after = after + forward.block_output(block, weights, x).view_as(x)
        x = after
    return sums


def attention_inputs(config: Mapping[str, Any], weights: Weights, layer: int, x: Tensor) -> dict[str, Tensor]:
    """By GGUF name without blk and weight: (tokens, in), and (heads, tokens, nope) for attn_k_b. Float64."""

    def weight(name: str) -> Tensor:
        return weights(f"model.layers.{layer}.{name}.weight").double()

    h = norm(x.flatten(0, 1), weight("input_layernorm"), config["rms_norm_eps"])
    q = norm(h @ weight("self_attn.q_a_proj").T, weight("self_attn.q_a_layernorm"), 1e-6)
    latent = (h @ weight("self_attn.kv_a_proj_with_mqa").T)[:, : config["kv_lora_rank"]]
    c = norm(latent, weight("self_attn.kv_a_layernorm"), 1e-6)
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    width = nope + config["qk_rope_head_dim"]
    queries = q @ weight("self_attn.q_b_proj").T
    by_head = torch.stack([queries[:, head * width : head * width + nope] for head in range(heads)])
    return {
        **{"attn_q_a": h, "attn_kv_a_mqa": h, "attn_q_b": q, "attn_k_b": by_head},
        "attn_v_b": c.expand(heads, *c.shape),
    }


def dense(config: Mapping[str, Any], weights: Weights, layer: int, block: DenseBlock, x: Tensor, sums: Sums) -> None:
    """The dense MLP or the shared expert."""
    prefix = f"model.layers.{layer}"
    h = norm(x.flatten(0, 1), weights(f"{prefix}.post_attention_layernorm.weight").double(), config["rms_norm_eps"])
    part, suffix = (".mlp", "") if block.name == "mlp" else (".mlp.shared_experts", "_shexp")
    gate, up = (weights(f"{prefix}{part}.{name}_proj.weight").double() for name in ("gate", "up"))
    add(sums, f"blk.{layer}.ffn_gate{suffix}.weight", h)
    add(sums, f"blk.{layer}.ffn_up{suffix}.weight", h)
    add(sums, f"blk.{layer}.ffn_down{suffix}.weight", silu(h @ gate.T) * (h @ up.T))


def experts(block: ExpertBlock, weights: Weights, layer: int, x: Tensor, sums: Sums) -> None:
    """Each routed expert for itself, over the tokens that chose it."""
    h = block.inputs(weights, x)
    chosen = block.route(weights, h).indices
    found: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    counts: list[int] = []
    for expert in range(block.n_experts):
        own = h[(chosen == expert).any(1)].double()
        gate, up = (weights(names[expert]).double() for names in (block.gates, block.ups))
        inputs = {"gate": own, "up": own, "down": silu(own @ gate.T) * (own @ up.T)}
        for name, values in inputs.items():
            found[name].append(values.square().sum(0))
        counts.append(len(own))
    sums.update({f"blk.{layer}.ffn_{name}_exps.weight": (torch.stack(rows), counts) for name, rows in found.items()})


def add(sums: Sums, name: str, values: Tensor) -> None:
    """values (tokens, in), or (heads, tokens, in)."""
    by_head = values if values.ndim == 3 else values[None]
    sums[name] = by_head.double().square().sum(1), [values.shape[-2]]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
