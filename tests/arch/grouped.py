"""Small configs of the families of grouped-query attention, as their official config.json is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ConfigOf = Callable[..., dict[str, Any]]
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _family(architecture: str, model_type: str, **own: Any) -> ConfigOf:
    def config(**changes: Any) -> dict[str, Any]:
        return {**SIZES, "architectures": [architecture], "model_type": model_type, **own, **changes}

    return config


GROUPED: dict[str, ConfigOf] = {
    "qwen3_moe": _family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        attention_bias=False,
        decoder_sparse_step=1,
        head_dim=64,
        mlp_only_layers=[],
        moe_intermediate_size=128,
        norm_topk_prob=True,
        num_experts=8,
        num_experts_per_tok=2,
        use_sliding_window=False,
    ),
    "glm4_moe": _family(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        attention_bias=True,
        first_k_dense_replace=1,
        head_dim=64,
        moe_intermediate_size=128,
        n_group=1,
        n_routed_experts=8,
        n_shared_experts=1,
        norm_topk_prob=True,
        num_experts_per_tok=2,
        num_nextn_predict_layers=1,
        partial_rotary_factor=0.5,
        rms_norm_eps=1e-5,
        routed_scaling_factor=2.5,
        topk_group=1,
        use_qk_norm=True,
    ),
    "mixtral": _family(
        "MixtralForCausalLM", "mixtral", num_experts_per_tok=2, num_local_experts=8, sliding_window=None
    ),
    "minimax_m2": _family(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        head_dim=64,
        num_experts_per_tok=2,
        num_local_experts=8,
        rotary_dim=32,
        scoring_func="sigmoid",
        use_qk_norm=True,
        use_routing_bias=True,
    ),
    "hy_v3": _family(
        "HYV3ForCausalLM",
        "hy_v3",
        first_k_dense_replace=1,
        head_dim=64,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        num_nextn_predict_layers=1,
        num_shared_experts=1,
        route_norm=True,
        router_scaling_factor=2.826,
    ),
    "ernie4_5_moe": _family(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        moe_intermediate_size=128,
        moe_k=2,
        moe_layer_start_index=1,
        moe_num_experts=8,
        moe_num_shared_experts=2,
        use_bias=False,
    ),
    "llama": _family("LlamaForCausalLM", "llama", attention_bias=False, mlp_bias=False, rope_scaling=LLAMA3),
    "qwen2": _family("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True, use_sliding_window=False),
    "qwen3": _family("Qwen3ForCausalLM", "qwen3", attention_bias=False, head_dim=64, use_sliding_window=False),
}
"""By `model_type`: all that the contract tests need of a family."""
