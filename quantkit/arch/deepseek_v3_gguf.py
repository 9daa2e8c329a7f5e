"""What llama.cpp calls the parts of a DeepSeek V3: architecture ``deepseek2``, tensor names and metadata.

In: official tensor names and the checked config. Out: GGUF names with the place in the stacked expert tensor, and the
architecture's key-values as plain Python values (int: uint32, float: float32, bool, str).
Sources: src/models/deepseek2.cpp, src/llama-context.cpp (yarn) and conversion/deepseek.py of llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.arch.base import KeyValue
from quantkit.arch.llama_cpp import MAX_EXPERTS, MAX_LAYERS, yarn_difference, yarn_flags
from quantkit.errors import ConfigError, SourceError
from quantkit.tensors import Role

if TYPE_CHECKING:
    from quantkit.arch.deepseek_v3_config import DeepseekConfig

GGUF_ARCHITECTURE = "deepseek2"

SOFTMAX, SIGMOID = 1, 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_...
_LITE_LAYERS, _LITE_48_VOCABULARY = (26, 27), 128_256
_LATENT_EPS = 1e-6  # see `deepseek_v3.LATENT_NORM_EPS`

WHOLE_KV_B = "attn_kv_b.weight"
"""kv_b_proj as files from before latent attention store it; such are read, not written."""

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": WHOLE_KV_B,
    "self_attn.kv_b_proj.weight:k": "attn_k_b.weight",
    "self_attn.kv_b_proj.weight:v": "attn_v_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    # Only MTP layers have these:
    "embed_tokens.weight": "nextn.embed_tokens.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
}
_STACKED = {
    "gate_proj.weight": "ffn_gate_exps.weight",
    "up_proj.weight": "ffn_up_exps.weight",
    "down_proj.weight": "ffn_down_exps.weight",
}
SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.head_count": "num_attention_heads",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
}
"""Key of the metadata, without the architecture -> entry of config.json, where both are the same number."""
KV_B_PARTS = ("attn_k_b.weight", "attn_v_b.weight")
MTP_INPUT, ROUTER, SELECTION_BIAS = "nextn.eh_proj.weight", "ffn_gate_inp.weight", "exp_probs_b.bias"
QUERY, LOW_QUERY = "attn_q.weight", "attn_q_a.weight"
"""The query projection of models without and with q_lora_rank."""
_GATE_UP_EXPERTS = "ffn_gate_up_exps.weight"
OLDER = {WHOLE_KV_B: Role.ATTENTION, _GATE_UP_EXPERTS: Role.EXPERT}
"""Tensors of a layer that llama.cpp takes in place of others, with their role."""
REPLACED_BY = {
    **dict.fromkeys(KV_B_PARTS, WHOLE_KV_B),
    **dict.fromkeys(("ffn_gate_exps.weight", "ffn_up_exps.weight"), _GATE_UP_EXPERTS),
}
"""Tensor of a layer -> the one of `OLDER` that stands for it."""
OPTIONAL = (
    "output.weight",
    "nextn.embed_tokens.weight",
    "nextn.shared_head_norm.weight",
    "nextn.shared_head_head.weight",
)
"""Tensors for which llama.cpp takes the embeddings, or the head and the norm of the main model, if they are missing."""

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9][0-9]{0,5})\.(.+)")


@dataclass(frozen=True, slots=True)
class Dialect:
    """``deepseek2``, or an architecture of llama.cpp that has its names and keys and some more.

    ``in_layer``: official names inside a layer -> those of GGUF; ``key_values``: keys without the architecture;
    ``defaults``: what llama.cpp takes for a missing key where that is not what it takes in deepseek2, None where it
    then refuses the file; ``faults``: why it cannot run this model; ``mtp_differences``: as of `differences`, of the
    MTP layer. llama.cpp has a graph of that layer in each of these architectures.
    """

    architecture: str = GGUF_ARCHITECTURE
    in_layer: Mapping[str, str] = field(default_factory=dict[str, str])
    key_values: Mapping[str, KeyValue] = field(default_factory=dict[str, KeyValue])
    defaults: Mapping[str, KeyValue | None] = field(default_factory=dict[str, "KeyValue | None"])
    faults: tuple[str, ...] = ()
    mtp_differences: tuple[str, ...] = ()


DEEPSEEK2 = Dialect()


def stored_name(name: str, dialect: Dialect = DEEPSEEK2) -> tuple[str, int | None]:
    """The GGUF name of an official tensor or of a part (`DeepseekV3.parts`), and its place in a stacked expert tensor.

    Raises SourceError for a name that the architecture has no place for.
    """
    if (stored := _TOP.get(name)) is not None:
        return stored, None
    if match := _LAYER.fullmatch(name):
        layer, rest = match.groups()
        if (stored := _IN_LAYER.get(rest)) is not None:
            return f"blk.{layer}.{stored}", None
        expert = _EXPERT.fullmatch(rest)
        if expert and (stored := _STACKED.get(expert[2])) is not None:
            return f"blk.{layer}.{stored}", int(expert[1])
        if (stored := dialect.in_layer.get(rest)) is not None:
            return f"blk.{layer}.{stored}", None
    raise SourceError(f"{name}: a GGUF file of architecture {dialect.architecture} has no place for this tensor.")


def key_values(config: DeepseekConfig, *, mtp: bool, dialect: Dialect = DEEPSEEK2) -> dict[str, KeyValue]:
    """general.architecture, general.type and every key of the architecture, in the order of llama.cpp's converter.

    int means uint32, float float32. ``mtp``: the file holds the MTP layer. Not here: tokenizer, file_type,
    quantization_version, names of the model. Raises ConfigError for what llama.cpp would refuse or compute otherwise.
    """
    _check(config, dialect, mtp=mtp)
    c = config
    values: dict[str, KeyValue] = {
        "block_count": c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0),
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,  # every head reads the same latent: MQA
        "rope.freq_base": float(c.rope_theta),
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "leading_dense_block_count": c.first_k_dense_replace,
        "vocab_size": c.vocab_size,
        "attention.q_lora_rank": c.q_lora_rank or 0,  # the key is required; 0 selects attn_q
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        **_expert_values(c),
        "rope.dimension_count": c.qk_rope_head_dim,
        **_yarn_values(c),
        **dialect.key_values,
    }
    if mtp:
        values["nextn_predict_layers"] = c.num_nextn_predict_layers
    named = {f"{dialect.architecture}.{key}": value for key, value in values.items()}
    return {"general.architecture": dialect.architecture, "general.type": "model", **named}


def is_lite(layers: int, vocab_size: int) -> bool:
    """Whether llama.cpp takes a model for a lite one, without q_lora_rank: deepseek2.cpp, is_lite. 48 layers with this
    vocabulary are GigaChat."""
    return layers in _LITE_LAYERS or (layers == 48 and vocab_size == _LITE_48_VOCABULARY)


def differences(config: DeepseekConfig, *, mtp: bool, dialect: Dialect = DEEPSEEK2) -> tuple[str, ...]:
    """What llama.cpp computes otherwise than the checkpoint's own code, one line each, to be shown in a plan.
    ``mtp``: the file holds the MTP layer."""
    lines = list(dialect.mtp_differences if mtp else ())
    if not math.isclose(config.rms_norm_eps, _LATENT_EPS, rel_tol=1e-6):
        # The official code norms the latents with 1e-6 whatever rms_norm_eps says; llama.cpp knows one eps.
        lines.append(
            f"llama.cpp norms the attention latents with rms_norm_eps {config.rms_norm_eps:g}, the official code with "
            f"{_LATENT_EPS:g}."
        )
    lines += yarn_difference(config.rope, dialect.architecture)
    if config.topk_method == "group_limited_greedy" and config.topk_group < config.n_group:
        # build_moe_ffn has one way to rank groups; seen in logits (tests/convert/test_relatives_gguf.py).
        lines.append(
            f"llama.cpp ranks the {config.n_group} groups of experts by the sum of their two best scores, this model "
            "by the best one: some tokens take other experts than in vLLM or transformers."
        )
    return tuple(lines)


def server_flags(config: DeepseekConfig) -> tuple[str, ...]:
    """Yarn's ramp, where it is not the one that llama.cpp assumes."""
    return yarn_flags(config.rope)


def _expert_values(c: DeepseekConfig) -> dict[str, KeyValue]:
    values: dict[str, KeyValue] = {
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_gating_func": SIGMOID if c.scoring_func == "sigmoid" else SOFTMAX,  # absent means softmax
    }
    if c.norm_topk_prob:
        values["expert_weights_norm"] = True
    # llama.cpp asserts 0 < used < count when count > 1; where every group is used, grouping chooses nothing.
    if c.topk_group < c.n_group:
        values |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    return values


def _yarn_values(c: DeepseekConfig) -> dict[str, KeyValue]:
    yarn = c.rope_scaling
    if yarn is None:
        return {}
    values: dict[str, KeyValue] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        "rope.scaling.original_context_length": yarn.original_max_position_embeddings or c.max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
    }
    if yarn.mscale_all_dim:
        # For this architecture alone a tenth is stored; the loader divides by 0.1 (TAG_DEEPSEEK2_YARN_LOG_MUL_FIX).
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * yarn.mscale_all_dim
    return values


def _check(c: DeepseekConfig, dialect: Dialect, *, mtp: bool) -> None:
    faults = [*_layout_faults(c, dialect), *_rope_faults(c), *dialect.faults, *(_mtp_faults(c) if mtp else ())]
    if faults:
        raise ConfigError(
            f"config.json: {'; '.join(faults)}.",
            hint="llama.cpp cannot run this model: choose another output format.",
        )


def _layout_faults(c: DeepseekConfig, dialect: Dialect) -> list[str]:
    faults: list[str] = []
    layers, may_be_lite = c.num_hidden_layers, dialect.architecture == GGUF_ARCHITECTURE
    if may_be_lite and c.q_lora_rank is not None and is_lite(layers, c.vocab_size):
        faults.append(
            f"num_hidden_layers {layers} with q_lora_rank {c.q_lora_rank}: a model of so many layers is a lite one to "
            "llama.cpp, without q_lora_rank"
        )
    if layers + c.num_nextn_predict_layers > MAX_LAYERS:
        faults.append(f"num_hidden_layers {layers}: llama.cpp holds at most {MAX_LAYERS} with MTP")
    if c.n_routed_experts > MAX_EXPERTS:
        faults.append(f"n_routed_experts {c.n_routed_experts}: llama.cpp holds at most {MAX_EXPERTS}")
    return faults


def _rope_faults(c: DeepseekConfig) -> list[str]:
    """llama.cpp takes mscale as equal to mscale_all_dim, so that sine and cosine are not scaled, only the softmax."""
    faults: list[str] = []
    if not c.rope_interleave:
        faults.append("rope_interleave is false, llama.cpp rotates neighbours in pairs for deepseek2")
    yarn = c.rope_scaling
    if yarn is None:
        return faults
    if not yarn.truncate:
        faults.append("rope_scaling.truncate is false, llama.cpp rounds the ramp of yarn to whole indices")
    scaled = yarn.factor > 1 and not yarn.mscale_all_dim
    if scaled or not math.isclose(c.rope.attention_factor, 1.0, abs_tol=1e-6):
        faults.append(
            f"rope_scaling has mscale {yarn.mscale}, mscale_all_dim {yarn.mscale_all_dim}, attention_factor "
            f"{yarn.attention_factor}; llama.cpp needs mscale equal to mscale_all_dim, not 0, and no attention_factor"
        )
    return faults


def _mtp_faults(c: DeepseekConfig) -> list[str]:
    faults: list[str] = []
    if c.num_nextn_predict_layers != 1:
        faults.append(f"num_nextn_predict_layers is {c.num_nextn_predict_layers}, llama.cpp runs exactly one MTP layer")
    if c.q_lora_rank is None:
        faults.append("q_lora_rank is null, llama.cpp runs an MTP layer only with it")
    return faults
