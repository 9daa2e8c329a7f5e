"""DeepSeek's architectures in plain torch, to train small models, and their export under the official names.

V3 with its MTP layer; V2 (``scoring_func`` softmax, ``q_lora_rank`` null, no MTP layer); V3.2 (``index_topk``), which
is trained with dense attention, and whose indexers learn from it afterwards (`train_relatives`). Without
``kv_lora_rank`` attention is grouped-query attention, as in GLM-4.5 and Qwen3 (`GroupedAttention`).

Written for a handful of experts: every expert sees every token, and the router's weights (zero for experts not
chosen) are multiplied in before the down projection. That is one dense MLP of width experts * moe_intermediate_size,
which has static shapes and compiles well. Source of the architecture: DeepSeek-V3 technical report (arXiv
2412.19437), sections 2.1 and 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = dict[str, Any]  # the raw config.json


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


def linear(inputs: int, outputs: int, gain: float = 1.0, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rotated_dim(config: Config) -> int:
    """Dimensions of a head that are rotated."""
    if "qk_rope_head_dim" in config:
        return config["qk_rope_head_dim"]
    return int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))


def yarn_frequencies(config: Config) -> Tensor:
    """Angle per position of each rotated pair, (rotated / 2,) float64. YaRN, arXiv 2309.00071, section 3.2."""
    dim, base, yarn = rotated_dim(config), config["rope_theta"], config["rope_scaling"]
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if yarn is None:
        return plain

    def pair_turning(rotations: float) -> float:
        return (
            dim * math.log(yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(base))
        )

    low = max(math.floor(pair_turning(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(yarn["beta_slow"])), dim - 1)
    stretched = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / yarn["factor"] * stretched + plain * (1 - stretched)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (batch, heads, length, rope dim) by cos, sin (length, rope dim / 2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1).type_as(x)


class Indexer(nn.Module):
    """The lightning indexer of DeepSeek V3.2 (its report, section 2.1): scores of keys, learnt from attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.dim, self.rope = config["index_n_heads"], config["index_head_dim"], config["qk_rope_head_dim"]
        self.wq_b = linear(config["q_lora_rank"], self.heads * self.dim)
        self.wk = linear(config["hidden_size"], self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = linear(config["hidden_size"], self.heads)

    def forward(self, x: Tensor, latent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, length, hidden), latent (batch, length, rank), normed -> scores (batch, queries, keys)."""
        q = self._rotated(self.wq_b(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2), cos, sin)
        k = self._rotated(self.k_norm(self.wk(x)), cos, sin)
        weights = self.weights_proj(x) * (self.heads * self.dim) ** -0.5
        return torch.einsum("bhqk,bqh->bqk", (q @ k.mT.unsqueeze(1)).relu(), weights)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., : self.rope].chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., self.rope :]), -1)


class Attention(nn.Module):
    """Multi-head latent attention."""

    def __init__(self, config: Config, residual_gain: float) -> None:
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config["rms_norm_eps"]
        self.heads, self.latent = heads, config["kv_lora_rank"]
        self.nope, self.rope, self.value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        rank = config["q_lora_rank"]
        if rank is None:
            self.q_proj = linear(hidden, heads * (self.nope + self.rope))
        else:
            self.q_a_proj = linear(hidden, rank)
            self.q_a_layernorm = RMSNorm(rank, eps)
            self.q_b_proj = linear(rank, heads * (self.nope + self.rope))
        self.q_lora = rank is not None
        self.indexer = Indexer(config) if "index_topk" in config else None
        self.kv_a_proj_with_mqa = linear(hidden, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, eps)
        self.kv_b_proj = linear(self.latent, heads * (self.nope + self.value))
        self.o_proj = linear(heads * self.value, hidden, residual_gain)
        yarn = config["rope_scaling"]
        mscale = 1.0 if yarn is None else 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
        self.scale = (self.nope + self.rope) ** -0.5 * mscale**2

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, length, hidden) normed -> (batch, heads, length, dims) each, rotated."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_lora else self.q_proj(x)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.value), -1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, self.heads, -1, -1)
        q = torch.cat((q[..., : self.nope], rotate(q[..., self.nope :], cos, sin)), -1)
        return q, torch.cat((k_nope, k_rope), -1), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x, cos, sin)
        # Fused attention kernels want one head size for q, k and v.
        v = F.pad(v, (0, self.nope + self.rope - self.value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)[..., : self.value]
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GroupedAttention(nn.Module):
    """Grouped-query attention: the first dimensions of each head rotated in halves, queries and keys normed before."""

    def __init__(self, config: Config, residual_gain: float) -> None:
        super().__init__()
        hidden, self.dim, bias = config["hidden_size"], config["head_dim"], config["attention_bias"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.rope = rotated_dim(config)
        self.q_proj = linear(hidden, self.heads * self.dim, bias=bias)
        self.k_proj = linear(hidden, self.groups * self.dim, bias=bias)
        self.v_proj = linear(hidden, self.groups * self.dim, bias=bias)
        self.o_proj = linear(self.heads * self.dim, hidden, residual_gain)
        self.q_norm, self.k_norm = (RMSNorm(self.dim, config["rms_norm_eps"]) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self._rotated(self.q_norm(q), cos, sin), self._rotated(self.k_norm(k), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., : self.rope].float().chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)
        return torch.cat((turned, x[..., self.rope :]), -1)


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int, residual_gain: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden, residual_gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Routed experts in groups with a selection bias ("noaux_tc"), or by softmax alone, plus shared experts.

    Returns the output, `load` (experts,), the share of the choices that each expert got, and the sequence-wise balance
    loss of the report's equations 17 to 20 (without its factor).
    """

    def __init__(self, config: Config, residual_gain: float) -> None:
        super().__init__()
        hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
        self.experts, self.top_k = experts, config["num_experts_per_tok"]
        self.groups, self.top_groups = config["n_group"], config["topk_group"]
        self.factor, self.normalize = config["routed_scaling_factor"], config["norm_topk_prob"]
        self.softmax = config["scoring_func"] == "softmax"
        self.router = nn.Parameter(torch.randn(experts, hidden) / math.sqrt(hidden))
        self.register_buffer("bias", torch.zeros(experts))
        self.gate = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(hidden))
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(hidden))
        self.down = nn.Parameter(torch.randn(hidden, experts, width) * (residual_gain / math.sqrt(width)))
        shared = config["n_shared_experts"]
        self.shared_experts = MLP(hidden, width * shared, residual_gain) if shared else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weight per token and expert, share of choices per expert, balance loss) of x (batch, length, hidden)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.float())
            scores = logits.softmax(-1) if self.softmax else logits.sigmoid()
        choice = scores if self.softmax else scores + self.bias
        group_score = choice.unflatten(-1, (self.groups, -1)).topk(2, -1).values.sum(-1)
        groups = torch.zeros_like(group_score).scatter(-1, group_score.topk(self.top_groups, -1).indices, 1.0)
        allowed = groups.repeat_interleave(self.experts // self.groups, -1) > 0
        chosen = choice.masked_fill(~allowed, float("-inf")).topk(self.top_k, -1).indices
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        kept = scores * mask
        weights = (kept / (kept.sum(-1, keepdim=True) + 1e-20) if self.normalize else kept) * self.factor
        fraction = mask.mean(1) * (self.experts / self.top_k)  # (batch, experts), 1 = balanced
        probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
        return weights, mask.mean((0, 1)) / self.top_k, (fraction * probability).sum(-1).mean()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, load, balance = self.route(x)
        inner = F.silu(F.linear(x, self.gate.flatten(0, 1))) * F.linear(x, self.up.flatten(0, 1))
        inner = inner.unflatten(-1, (self.experts, -1)) * weights.unsqueeze(-1).type_as(inner)
        routed = F.linear(inner.flatten(-2), self.down.flatten(1))
        return routed if self.shared_experts is None else routed + self.shared_experts(x), load, balance


class Layer(nn.Module):
    def __init__(self, config: Config, dense: bool, residual_gain: float) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        attention = Attention if "kv_lora_rank" in config else GroupedAttention
        self.self_attn = attention(config, residual_gain)
        self.mlp = MLP(hidden, config["intermediate_size"], residual_gain) if dense else MoE(config, residual_gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, load, balance = self.mlp(normed)
            return x + out, load, balance
        return x + self.mlp(normed), None, None


@dataclass
class Output:
    logits: Tensor  # (batch, length, vocab): the next token
    mtp_logits: Tensor | None  # (batch, length, vocab): the token after the next
    loads: list[Tensor]  # (experts,) of each MoE layer, the MTP layer last
    balance: Tensor


class DeepseekV3(nn.Module):
    """Main model plus, if the config has one, an MTP layer which shares embedding and head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, eps, vocab = config["hidden_size"], config["rms_norm_eps"], config["vocab_size"]
        layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
        gain = 1 / math.sqrt(2 * layers)
        self.config = config
        self.embed_tokens = nn.Embedding(vocab, hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.n_layers, self.mtp = layers, config["num_nextn_predict_layers"] > 0
        self.layers = nn.ModuleList(Layer(config, index < dense, gain) for index in range(layers + self.mtp))
        self.norm = RMSNorm(hidden, eps)
        if self.mtp:
            self.enorm, self.hnorm, self.head_norm = (RMSNorm(hidden, eps) for _ in range(3))
            self.eh_proj = linear(2 * hidden, hidden)
        self.lm_head = linear(hidden, vocab, 0.5)
        self.register_buffer("frequencies", yarn_frequencies(config), persistent=False)

    def moe_layers(self) -> list[MoE]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def forward(self, tokens: Tensor, next_tokens: Tensor | None = None) -> Output:
        """`tokens` (batch, length); with `next_tokens` (the same, one further) the MTP layer runs too."""
        angles = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float64)[:, None] * self.frequencies
        cos, sin = angles.cos().float(), angles.sin().float()
        loads: list[Tensor] = []
        balances: list[Tensor] = []

        def run(layer: nn.Module, x: Tensor) -> Tensor:
            x, load, balance = layer(x, cos, sin)
            if load is not None and balance is not None:
                loads.append(load)
                balances.append(balance)
            return x

        x = self.embed_tokens(tokens)
        for layer in self.layers[: self.n_layers]:
            x = run(layer, x)
        hidden = self.norm(x)
        mtp_logits = None
        if next_tokens is not None and self.mtp:
            # Embedding first: vLLM and llama.cpp read eh_proj's columns in this order.
            joined = torch.cat((self.enorm(self.embed_tokens(next_tokens)), self.hnorm(hidden)), -1)
            mtp_logits = self.lm_head(self.head_norm(run(self.layers[-1], self.eh_proj(joined))))
        balance = torch.stack(balances).sum() if balances else hidden.new_zeros(())
        return Output(self.lm_head(hidden), mtp_logits, loads, balance)


def _layer_tensors(prefix: str, layer: Layer) -> dict[str, Tensor]:
    named = {f"{prefix}.{name}": value for name, value in layer.state_dict().items() if not name.startswith("mlp.")}
    mlp = layer.mlp
    if not isinstance(mlp, MoE):
        return named | {f"{prefix}.mlp.{name}": value for name, value in mlp.state_dict().items()}
    named[f"{prefix}.mlp.gate.weight"] = mlp.router.detach()
    # A constant added to all biases changes no choice. With the smallest at 0 every biased score is positive, so that
    # runtimes which mask the losing groups with 0 and those which mask with -inf agree.
    if not mlp.softmax:
        named[f"{prefix}.mlp.gate.e_score_correction_bias"] = mlp.bias - mlp.bias.min()
    for expert in range(mlp.experts):
        named[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = mlp.gate[expert].detach()
        named[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = mlp.up[expert].detach()
        named[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = mlp.down[:, expert].detach()
    if mlp.shared_experts is None:
        return named
    return named | {f"{prefix}.mlp.shared_experts.{name}": v for name, v in mlp.shared_experts.state_dict().items()}


def _mtp_tensors(last: str, model: DeepseekV3) -> dict[str, Tensor]:
    return {
        f"{last}.embed_tokens.weight": model.embed_tokens.weight,
        f"{last}.enorm.weight": model.enorm.weight,
        f"{last}.hnorm.weight": model.hnorm.weight,
        f"{last}.eh_proj.weight": model.eh_proj.weight,
        **_layer_tensors(last, model.layers[-1]),  # type: ignore[arg-type]
        f"{last}.shared_head.norm.weight": model.head_norm.weight,
        f"{last}.shared_head.head.weight": model.lm_head.weight,
    }


def official_tensors(model: DeepseekV3) -> dict[str, Tensor]:
    """All tensors under the official names, in the order of the model: BF16 on the CPU, the selection biases F32."""
    tensors = {"model.embed_tokens.weight": model.embed_tokens.weight}
    for index, layer in enumerate(model.layers[: model.n_layers]):
        tensors |= _layer_tensors(f"model.layers.{index}", layer)  # type: ignore[arg-type]
    tensors |= {"model.norm.weight": model.norm.weight, "lm_head.weight": model.lm_head.weight}
    if model.mtp:
        tensors |= _mtp_tensors(f"model.layers.{model.n_layers}", model)
    keep_f32 = "e_score_correction_bias"
    return {
        name: value.detach()
        .to("cpu", torch.float32 if name.endswith(keep_f32) else torch.bfloat16)
        .contiguous()
        .clone()
        for name, value in tensors.items()
    }
