"""The family ``deepseek_v3``: DeepSeek V3, V3.1 and R1 (arXiv 2412.19437), and models of the same architecture.

In: config.json in the official form. Out: the table of tensors, and for each decoder layer its sublayers. This file
holds names and checks only; the arithmetic is in `mla`, `moe` and `ops`, which are imported when the first layer is
asked for, so that planning needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit.arch.base import (
    CheckpointVariants,
    DenseBlock,
    GgufModel,
    LinearPart,
    MlpNames,
    MtpLayer,
    NormWeight,
    RoutedExperts,
    ServingSizes,
    Sublayer,
)
from quantkit.arch.deepseek_v3_config import LATENT_NORM_EPS, DeepseekConfig, DeepseekV3Config
from quantkit.arch.mtp import mtp_layer
from quantkit.arch.rope import LinearScaling
from quantkit.arch.specs import mlp_specs, mtp_specs
from quantkit.tensors import Projection, Role, TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from quantkit.arch.base import Weights
    from quantkit.arch.mla import MlaShape
    from quantkit.arch.moe import Router


MLP_NAMES = MlpNames(gate="gate_proj", up="up_proj", down="down_proj")


class DeepseekV3:
    """A `ModelArch`. MTP layers are numbered from ``num_hidden_layers`` on, as in the official files."""

    stacked_experts: bool = False
    longest_exact: int | None = None

    def __init__(self, config: Mapping[str, object], *, root: str = "", carried: tuple[str, ...] = ()) -> None:
        """``root``: what stands before every name; ``carried``: as of `CheckpointVariants`. Raises `ConfigError`."""
        self.config: DeepseekConfig
        self._root, self._carried = root, carried
        self._bind(self._checked(config))

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        """What this family understands of a config.json."""
        return DeepseekV3Config.of(config)

    def _bind(self, config: DeepseekConfig, scaling: LinearScaling | None = None) -> None:
        self.config = config
        self._rope = replace(config.rope, linear=scaling)
        self.n_layers: int = config.num_hidden_layers
        self.n_mtp_layers: int = config.num_nextn_predict_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.embed: str = f"{self._root}model.embed_tokens.weight"
        self.final_norm: str = f"{self._root}model.norm.weight"
        self.lm_head: str = self.embed if config.tie_word_embeddings else f"{self._root}lm_head.weight"

    def computing(self, config: DeepseekConfig, scaling: LinearScaling | None) -> Self:
        """The same tensors, computed as ``config`` and a ``scaling`` of positions say: what llama.cpp makes of a file
        (`GgufModel.read`)."""
        changed = copy(self)
        changed._bind(config, scaling)
        return changed

    def tensors(self) -> Iterator[TensorSpec]:
        """Embedding, decoder layers, final norm, head, then the MTP layers: every tensor of an official checkpoint."""
        table = (self.vocab_size, self.hidden_size)
        yield TensorSpec(self.embed, table, Role.EMBED, table=True)
        for layer in range(self.n_layers):
            yield from self._layer_tensors(layer)
        yield TensorSpec(self.final_norm, (self.hidden_size,), Role.NORM)
        if self.lm_head != self.embed:
            yield TensorSpec(self.lm_head, table, Role.LM_HEAD, table=True)
        for layer in range(self.n_layers, self.n_layers + self.n_mtp_layers):
            yield from self._mtp_tensors(layer)

    def variants(self) -> CheckpointVariants:
        """Rotary buffers (Kimi, Moonlight), MTP layers without copies of embedding and head, a head beside tied
        embeddings; and what V3.2 adds."""
        copies: dict[str, str] = {}
        for layer in range(self.n_layers, self.n_layers + self.n_mtp_layers):
            copies[f"{self._prefix(layer)}embed_tokens.weight"] = self.embed
            copies[f"{self._prefix(layer)}shared_head.head.weight"] = self.lm_head
        return CheckpointVariants(
            derived=("*.rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached"),
            copies=copies,
            tied={f"{self._root}lm_head.weight": self.embed} if self.lm_head == self.embed else {},
            mtp_marker=".eh_proj.weight",
            mtp_own=(".eh_proj.weight", ".enorm.weight", ".hnorm.weight"),
            carried=self._carried,
            foreign={"*.self_attn.indexer.*": "DeepSeek V3.2 (sparse attention)"},
        )

    def parts(self) -> Mapping[str, LinearPart]:
        """kv_b_proj of each layer as its key part, ``:k``, and its value part, ``:v``.

        Where the latent itself is cached (weight absorption, arXiv 2405.04434, section 2.1.2), queries pass through the
        key part head by head before they meet it: its inputs are the queries, so it is turned.
        """
        c = self.config
        nope, rank = c.qk_nope_head_dim, c.kv_lora_rank
        whole_shape = (c.num_attention_heads * (nope + c.v_head_dim), rank)
        parts: dict[str, LinearPart] = {}
        for layer in range(self.n_layers + self.n_mtp_layers):
            whole = f"{self._prefix(layer)}self_attn.kv_b_proj.weight"
            for suffix, turned, shape in (
                ("k", True, (c.num_attention_heads, rank, nope)),
                ("v", False, (c.num_attention_heads, c.v_head_dim, rank)),
            ):
                place = _HeadRows(c.num_attention_heads, nope if suffix == "v" else 0, nope, turned)
                name = f"{whole}:{suffix}"
                parts[name] = LinearPart(name, whole, whole_shape, shape, place.take, place.put)
        return parts

    def sublayers(self, layer: int) -> tuple[Sublayer, ...]:
        """Attention, then the dense MLP or the shared expert beside the routed ones. ``layer`` may be an MTP layer."""
        from quantkit.arch import moe

        assert 0 <= layer < self.n_layers + self.n_mtp_layers, f"layer {layer} of {self.n_layers}"
        c = self.config
        prefix = self._prefix(layer)
        attention = self._attention(layer)
        norm = moe.Norm(f"{prefix}post_attention_layernorm.weight", c.rms_norm_eps)
        if self._is_dense(layer):
            mlp = moe.Mlp.named(f"{prefix}mlp.", MLP_NAMES)
            producer = NormWeight(norm.weight, moe.readers([mlp]))
            return (attention,), (moe.mlp_block("mlp", mlp, norm, producer),)
        router = self._router(f"{prefix}mlp.")
        shared = moe.Mlp.named(f"{prefix}mlp.shared_experts.", MLP_NAMES)
        routed = [moe.Mlp.named(f"{prefix}mlp.experts.{e}.", MLP_NAMES) for e in range(c.n_routed_experts)]
        producer = NormWeight(norm.weight, (router.weight, *moe.readers([shared, *routed])))
        return (attention,), (
            moe.mlp_block("shared_experts", shared, norm, producer),
            moe.expert_block("experts", routed, norm, router, producer),
        )

    def _router(self, prefix: str) -> Router:
        from quantkit.arch import moe

        c = self.config
        return moe.ScoredRouter(
            weight=f"{prefix}gate.weight",
            bias=f"{prefix}gate.e_score_correction_bias",
            n_groups=c.n_group,
            top_groups=c.topk_group,
            top_k=c.num_experts_per_tok,
            normalize=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
            gating=c.scoring_func,
        )

    def _attention(self, layer: int) -> DenseBlock:
        from quantkit.arch import mla

        return mla.attention_block(self._prefix(layer), self._attention_shape())

    def _attention_shape(self) -> MlaShape:
        from quantkit.arch import mla

        c = self.config
        return mla.MlaShape(
            n_heads=c.num_attention_heads,
            q_lora=c.q_lora_rank is not None,
            kv_lora_rank=c.kv_lora_rank,
            nope_dim=c.qk_nope_head_dim,
            v_dim=c.v_head_dim,
            rope=self._rope,
            norm_eps=c.rms_norm_eps,
            latent_eps=LATENT_NORM_EPS,
        )

    def gguf(self) -> GgufModel:
        """Architecture ``deepseek2`` of llama.cpp."""
        from quantkit.arch.deepseek_v3_gguf_model import DeepseekV3Gguf

        return DeepseekV3Gguf(self.config, self.computing, self._root)

    def serving(self) -> ServingSizes:
        """Sizes with the latent and the rotated key in the KV cache, which all heads share."""
        c = self.config
        latent, rotated = c.kv_lora_rank, c.qk_rope_head_dim
        return ServingSizes(
            heads=c.num_attention_heads,
            query_width=latent + rotated,
            context_width=latent,
            kv_bytes_per_token=2 * (latent + rotated),
            kv_heads=1,
            top_k=c.num_experts_per_tok,
            expert_width=c.moe_intermediate_size,
            max_positions=c.max_position_embeddings,
        )

    def routed_experts(self) -> RoutedExperts | None:
        """In equal groups, ranked by their best two (``noaux_tc``) or by their best one."""
        c = self.config
        if all(map(self._is_dense, range(self.n_layers + self.n_mtp_layers))):
            return None
        return RoutedExperts(
            count=c.n_routed_experts,
            groups=c.n_group,
            top_groups=c.topk_group,
            ranked_by=2 if c.topk_method == "noaux_tc" else 1,
            top_k=c.num_experts_per_tok,
            config_key="n_routed_experts",
        )

    def with_experts(self, count: int) -> Self:
        """The same model with so many routed experts in each layer."""
        return self.computing(self.config.model_copy(update={"n_routed_experts": count}), self._rope.linear)

    def final_hidden(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) float32 after the last layer -> normed, float32, the input of lm_head."""
        from quantkit.arch import ops

        return ops.rms_norm(x, weights(self.final_norm), self.config.rms_norm_eps)

    def mtp_layers(self) -> Mapping[int, MtpLayer]:
        """By number, from ``num_hidden_layers`` on."""
        numbers = range(self.n_layers, self.n_layers + self.n_mtp_layers)
        return {layer: mtp_layer(self._prefix(layer), self.config.rms_norm_eps) for layer in numbers}

    def _prefix(self, layer: int) -> str:
        return f"{self._root}model.layers.{layer}."

    def _is_dense(self, layer: int) -> bool:
        return layer < min(self.config.first_k_dense_replace, self.n_layers)

    def _layer_tensors(self, layer: int) -> Iterator[TensorSpec]:
        hidden, prefix = self.hidden_size, self._prefix(layer)
        yield TensorSpec(f"{prefix}input_layernorm.weight", (hidden,), Role.NORM, layer)
        yield from self._attention_tensors(layer, f"{prefix}self_attn.")
        yield TensorSpec(f"{prefix}post_attention_layernorm.weight", (hidden,), Role.NORM, layer)
        if self._is_dense(layer):
            sizes = (hidden, self.config.intermediate_size)
            yield from mlp_specs(f"{prefix}mlp.", MLP_NAMES, sizes, Role.MLP, layer)
        else:
            yield from self._moe_tensors(layer, f"{prefix}mlp.")

    def _attention_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        c = self.config
        q_size = c.num_attention_heads * c.qk_head_dim
        kv_size = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)

        def linear(name: str, projection: Projection, shape: tuple[int, int]) -> TensorSpec:
            return TensorSpec(
                f"{prefix}{name}.weight", shape, Role.ATTENTION, layer, projection=projection, linear=True
            )

        def latent(name: str, projection: Projection, rank: int) -> TensorSpec:
            fused = None if c.q_lora_rank is None else "fused_qkv_a_proj"
            return replace(linear(name, projection, (rank, c.hidden_size)), fused=fused, replicated=True)

        if c.q_lora_rank is None:
            yield linear("q_proj", Projection.Q, (q_size, c.hidden_size))
        else:
            yield latent("q_a_proj", Projection.Q_A, c.q_lora_rank)
            yield TensorSpec(f"{prefix}q_a_layernorm.weight", (c.q_lora_rank,), Role.NORM, layer)
            yield linear("q_b_proj", Projection.Q_B, (q_size, c.q_lora_rank))
        yield latent("kv_a_proj_with_mqa", Projection.KV_A, c.kv_lora_rank + c.qk_rope_head_dim)
        yield TensorSpec(f"{prefix}kv_a_layernorm.weight", (c.kv_lora_rank,), Role.NORM, layer)
        yield linear("kv_b_proj", Projection.KV_B, (kv_size, c.kv_lora_rank))
        yield linear("o_proj", Projection.OUT, (c.hidden_size, c.num_attention_heads * c.v_head_dim))

    def _moe_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        c = self.config
        yield from self._router_tensors(layer, prefix)
        sizes = (self.hidden_size, c.moe_intermediate_size)
        for expert in range(c.n_routed_experts):
            yield from mlp_specs(f"{prefix}experts.{expert}.", MLP_NAMES, sizes, Role.EXPERT, layer, expert)
        # Several shared experts are stored, and computed, as one MLP of their summed width.
        shared = (self.hidden_size, c.n_shared_experts * c.moe_intermediate_size)
        yield from mlp_specs(f"{prefix}shared_experts.", MLP_NAMES, shared, Role.SHARED_EXPERT, layer)

    def _router_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        experts = self.config.n_routed_experts
        yield TensorSpec(f"{prefix}gate.weight", (experts, self.hidden_size), Role.ROUTER, layer, by_expert=True)
        yield TensorSpec(
            f"{prefix}gate.e_score_correction_bias", (experts,), Role.ROUTER, layer, float32=True, by_expert=True
        )

    def _mtp_tensors(self, layer: int) -> Iterator[TensorSpec]:
        table = (self.vocab_size, self.hidden_size)
        return mtp_specs(self._prefix(layer), table, layer, self._layer_tensors(layer))


@dataclass(frozen=True, slots=True)
class _HeadRows:
    """The first ``nope`` rows of each head of kv_b_proj (``start`` 0), or the rest; ``turned``: rows become columns."""

    n_heads: int
    start: int
    nope: int
    turned: bool

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """(heads * (nope + v), rank) -> (heads, rank, nope) or (heads, v, rank)."""
        part = self._view(whole)
        return part.mT.contiguous() if self.turned else part.contiguous()

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse, into ``whole``."""
        self._view(whole).copy_(part.mT if self.turned else part)

    def _view(self, whole: torch.Tensor) -> torch.Tensor:
        heads = whole.view(self.n_heads, -1, whole.shape[-1])
        return heads[:, self.start :] if self.start else heads[:, : self.nope]
