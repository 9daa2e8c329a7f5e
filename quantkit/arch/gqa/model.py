"""A decoder of grouped-query attention and gated MLPs, dense or as experts: what a row of `families` and a config.json
describe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.arch.base import (
    CheckpointVariants,
    DenseBlock,
    GgufModel,
    LinearPart,
    MtpLayer,
    NormWeight,
    RoutedExperts,
    ServingSizes,
    Sublayer,
)
from quantkit.arch.gqa.config import GqaConfig
from quantkit.arch.gqa.family import MLP_NAMES, GqaFamily
from quantkit.arch.mtp import mtp_layer
from quantkit.arch.specs import mlp_specs, mtp_specs
from quantkit.tensors import Projection, Role, TensorSpec

if TYPE_CHECKING:
    import torch

    from quantkit.arch.base import Weights
    from quantkit.arch.moe import Router

PAIRED = ":pairs"
"""Ending of the part that is all of q or k, rows in the order in which llama.cpp rotates neighbours."""


class Gqa:
    """A `ModelArch`. MTP layers are numbered from ``num_hidden_layers`` on."""

    stacked_experts: bool = False
    longest_exact: int | None = None
    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"

    def __init__(self, family: GqaFamily, config: GqaConfig) -> None:
        self.family, self.config = family, config
        self.n_layers: int = config.num_hidden_layers
        self.n_mtp_layers: int = config.num_nextn_predict_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.lm_head: str = self.embed if config.tie_word_embeddings else "lm_head.weight"

    @classmethod
    def of(cls, family: GqaFamily, config: Mapping[str, object]) -> Gqa:
        """The model of a raw config.json. Raises `ConfigError`."""
        return cls(family, family.config_of(config))

    def tensors(self) -> Iterator[TensorSpec]:
        """Embedding, decoder layers, final norm, head, then the MTP layers: every tensor of an official checkpoint."""
        table = (self.vocab_size, self.hidden_size)
        yield TensorSpec(self.embed, table, Role.EMBED, table=True)
        for layer in range(self.n_layers):
            yield from self._layer_tensors(layer)
        yield TensorSpec(self.final_norm, (self.hidden_size,), Role.NORM)
        if self.lm_head != self.embed:
            yield TensorSpec(self.lm_head, table, Role.LM_HEAD, table=True)
        for layer in self._mtp_numbers:
            yield from mtp_specs(_prefix(layer), table, layer, self._layer_tensors(layer), self.family.mtp_norm)

    def variants(self) -> CheckpointVariants:
        """Rotary buffers, MTP layers without copies of embedding and head, a head beside tied embeddings."""
        copies: dict[str, str] = {}
        for layer in self._mtp_numbers:
            copies[f"{_prefix(layer)}embed_tokens.weight"] = self.embed
            copies[f"{_prefix(layer)}shared_head.head.weight"] = self.lm_head
        return CheckpointVariants(
            derived=("*.rotary_emb.inv_freq",),
            copies=copies,
            tied={"lm_head.weight": self.embed} if self.lm_head == self.embed else {},
            mtp_marker=".eh_proj.weight",
            mtp_own=(".eh_proj.weight", ".enorm.weight", ".hnorm.weight"),
        )

    def parts(self) -> Mapping[str, LinearPart]:
        """q and k of each layer in llama.cpp's order of rows, where it has another."""
        if not self.family.llama_cpp.permuted:
            return {}
        c, parts = self.config, dict[str, LinearPart]()
        for layer in range(self.n_layers + self.n_mtp_layers):
            for name, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
                whole = f"{_prefix(layer)}self_attn.{name}_proj.weight"
                shape, rows = (heads * c.head_dim, c.hidden_size), _PairedRows(heads)
                parts[f"{whole}{PAIRED}"] = LinearPart(f"{whole}{PAIRED}", whole, shape, shape, rows.take, rows.put)
        return parts

    def sublayers(self, layer: int) -> tuple[Sublayer, ...]:
        """Attention, then the dense MLP, or the routed experts and what is shared beside them."""
        from quantkit.arch import moe

        assert 0 <= layer < self.n_layers + self.n_mtp_layers, f"layer {layer} of {self.n_layers}"
        c, names, prefix = self.config, self.family.moe, _prefix(layer)
        norm = moe.Norm(f"{prefix}post_attention_layernorm.weight", c.rms_norm_eps)
        if c.is_dense(layer):
            mlp = moe.Mlp.named(f"{prefix}mlp.", MLP_NAMES)
            producer = NormWeight(norm.weight, moe.readers([mlp]))
            return (self._attention(layer),), (moe.mlp_block("mlp", mlp, norm, producer),)
        block = f"{prefix}{names.block}"
        router = self._router(block)
        shared = [moe.Mlp.named(f"{block}{names.shared}", MLP_NAMES)] if c.n_shared_experts else []
        routed = [moe.Mlp.named(f"{block}{names.experts}{e}.", names.expert) for e in range(c.n_routed_experts)]
        producer = NormWeight(norm.weight, (router.weight, *moe.readers([*shared, *routed])))
        return (self._attention(layer),), (
            *(moe.mlp_block("shared_experts", mlp, norm, producer) for mlp in shared),
            moe.expert_block("experts", routed, norm, router, producer),
        )

    def gguf(self) -> GgufModel:
        """See `GqaGguf`."""
        from quantkit.arch.gqa.gguf import GqaGguf

        return GqaGguf(self.family, self.config, self)

    def serving(self) -> ServingSizes:
        """Sizes with keys and values of each shared head in the KV cache."""
        c = self.config
        return ServingSizes(
            heads=c.num_attention_heads,
            query_width=c.head_dim,
            context_width=c.head_dim,
            kv_bytes_per_token=2 * 2 * c.num_key_value_heads * c.head_dim,
            kv_heads=c.num_key_value_heads,
            top_k=c.num_experts_per_tok if c.n_routed_experts else 1,
            expert_width=c.moe_intermediate_size if c.n_routed_experts else c.intermediate_size,
            max_positions=c.max_position_embeddings,
        )

    def routed_experts(self) -> RoutedExperts | None:
        """In equal groups, ranked by their best two."""
        c = self.config
        if all(map(c.is_dense, range(self.n_layers + self.n_mtp_layers))):
            return None
        return RoutedExperts(
            count=c.n_routed_experts,
            groups=c.n_group,
            top_groups=c.topk_group,
            ranked_by=2,
            top_k=c.num_experts_per_tok,
            config_key=self.family.entries.get("n_routed_experts", "n_routed_experts"),
        )

    def with_experts(self, count: int) -> Gqa:
        """The same model with so many routed experts in each layer."""
        return Gqa(self.family, self.config.model_copy(update={"n_routed_experts": count}))

    def final_hidden(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) float32 after the last layer -> normed, float32, the input of lm_head."""
        from quantkit.arch import ops

        return ops.rms_norm(x, weights(self.final_norm), self.config.rms_norm_eps)

    def mtp_layers(self) -> Mapping[int, MtpLayer]:
        """By number, from ``num_hidden_layers`` on."""
        eps, norm = self.config.rms_norm_eps, self.family.mtp_norm
        return {layer: mtp_layer(_prefix(layer), eps, norm) for layer in self._mtp_numbers}

    @property
    def _mtp_numbers(self) -> range:
        return range(self.n_layers, self.n_layers + self.n_mtp_layers)

    def _attention(self, layer: int) -> DenseBlock:
        from quantkit.arch.gqa import attention

        c, prefix = self.config, _prefix(layer)
        shape = attention.GqaShape(
            n_heads=c.num_attention_heads,
            n_kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            rope=c.rope,
            norm_eps=c.rms_norm_eps,
            qkv_bias=c.qkv_bias,
            qk_norm=c.qk_norm,
        )
        paired = tuple(f"{prefix}self_attn.{name}_proj.weight{PAIRED}" for name in "qk")
        return attention.attention_block(prefix, shape, paired if self.family.llama_cpp.permuted else ())

    def _router(self, block: str) -> Router:
        from quantkit.arch import moe

        c, names = self.config, self.family.moe
        return moe.ScoredRouter(
            weight=f"{block}{names.router}",
            top_k=c.num_experts_per_tok,
            gating=c.scoring_func,
            normalize=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
            bias=f"{block}{names.bias}" if c.selection_bias else None,
            n_groups=c.n_group,
            top_groups=c.topk_group,
        )

    def _layer_tensors(self, layer: int) -> Iterator[TensorSpec]:
        hidden, prefix = self.hidden_size, _prefix(layer)
        yield TensorSpec(f"{prefix}input_layernorm.weight", (hidden,), Role.NORM, layer)
        yield from self._attention_tensors(layer, f"{prefix}self_attn.")
        yield TensorSpec(f"{prefix}post_attention_layernorm.weight", (hidden,), Role.NORM, layer)
        if self.config.is_dense(layer):
            yield from mlp_specs(f"{prefix}mlp.", MLP_NAMES, (hidden, self.config.intermediate_size), Role.MLP, layer)
        else:
            yield from self._moe_tensors(layer, f"{prefix}{self.family.moe.block}")

    def _attention_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        c, attention = self.config, Role.ATTENTION
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        for name, projection, rows in (
            ("q_proj", Projection.Q, queries),
            ("k_proj", Projection.K, keys),
            ("v_proj", Projection.V, keys),
        ):
            weight, shape = f"{prefix}{name}.weight", (rows, c.hidden_size)
            yield TensorSpec(weight, shape, attention, layer, projection=projection, linear=True, fused="qkv_proj")
            if c.qkv_bias:
                yield TensorSpec(f"{prefix}{name}.bias", (rows,), Role.NORM, layer)
        shape = (c.hidden_size, queries)
        yield TensorSpec(f"{prefix}o_proj.weight", shape, attention, layer, projection=Projection.OUT, linear=True)
        if c.qk_norm != "none":
            flat = c.qk_norm == "flat"
            for name, width in (("q_norm", queries), ("k_norm", keys)):
                yield TensorSpec(f"{prefix}{name}.weight", (width if flat else c.head_dim,), Role.NORM, layer)

    def _moe_tensors(self, layer: int, block: str) -> Iterator[TensorSpec]:
        c, names, hidden = self.config, self.family.moe, self.hidden_size
        yield TensorSpec(f"{block}{names.router}", (c.n_routed_experts, hidden), Role.ROUTER, layer, by_expert=True)
        if c.selection_bias:
            shape = (1, c.n_routed_experts) if names.bias_row else (c.n_routed_experts,)
            yield TensorSpec(f"{block}{names.bias}", shape, Role.ROUTER, layer, float32=True)
        sizes = (hidden, c.moe_intermediate_size)
        for expert in range(c.n_routed_experts):
            prefix = f"{block}{names.experts}{expert}."
            yield from mlp_specs(prefix, names.expert, sizes, Role.EXPERT, layer, expert)
        if c.n_shared_experts:  # stored, and computed, as one MLP of their summed width
            width = c.n_shared_experts * c.moe_intermediate_size
            yield from mlp_specs(f"{block}{names.shared}", MLP_NAMES, (hidden, width), Role.SHARED_EXPERT, layer)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


@dataclass(frozen=True, slots=True)
class _PairedRows:
    """Rows of q or k so that the two of a rotated pair are neighbours: they lie half a head apart in the checkpoint."""

    heads: int

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """(heads * dim, in) -> the same, rows (0, dim / 2, 1, dim / 2 + 1, ...) of each head."""
        return whole.view(self.heads, 2, -1, whole.shape[-1]).transpose(1, 2).reshape(whole.shape)

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse, into ``whole``."""
        halves = whole.view(self.heads, 2, -1, whole.shape[-1])
        halves.copy_(part.view(self.heads, -1, 2, whole.shape[-1]).transpose(1, 2))
