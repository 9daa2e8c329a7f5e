"""Small configs of the families that have DeepSeek V3's layer, as their official config.json is written."""

from __future__ import annotations

from typing import Any

from tests.tiny_models import tiny_config

KIMI_TEXT = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "n_routed_experts": 24}


def deepseek_v2(**changes: Any) -> dict[str, Any]:
    """V2-Lite's kind: no query latent, no groups, two shared experts."""
    return tiny_config(
        **{
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 0,
            **changes,
        }
    )


def glm4_moe_lite(**changes: Any) -> dict[str, Any]:
    """GLM-4.7-Flash's: nothing is said of the routing but sizes."""
    config = tiny_config(architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite", rope_scaling=None)
    for key in ("scoring_func", "topk_method", "first_k_dense_replace"):
        del config[key]
    kinds = ["dense", "sparse", "sparse"]
    values = {"n_group": 1, "topk_group": 1, "v_head_dim": 64, "rms_norm_eps": 1e-5, "mlp_layer_types": kinds}
    return {**config, **values, **changes}


def kimi_k25(**changes: Any) -> dict[str, Any]:
    """Kimi K2.5's: the language model's config under text_config."""
    text = tiny_config(**{"model_type": "kimi_k2", **KIMI_TEXT, **changes})
    del text["architectures"]
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "projection_hidden_size": 64,
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        },
    }


def kimi_vl(**changes: Any) -> dict[str, Any]:
    """Kimi-VL-A3B's: Moonlight's config under text_config."""
    text = {"model_type": "deepseek_v3", "q_lora_rank": None, "n_shared_experts": 2, "rope_scaling": None, **changes}
    config = kimi_k25(**text)
    return {**config, "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl"}


def deepseek_v32(**changes: Any) -> dict[str, Any]:
    """V3.2's: an indexer of small top_k, and of so many heads that no two keys have the score 0."""
    sizes = {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 40, "num_nextn_predict_layers": 0}
    names = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    return tiny_config(**{**names, **sizes, **changes})


def glm_moe_dsa(**changes: Any) -> dict[str, Any]:
    """GLM-5's: nothing is said of the routing but sizes, unless ``changes`` say it."""
    config = deepseek_v32(
        **{
            "architectures": ["GlmMoeDsaForCausalLM"],
            "model_type": "glm_moe_dsa",
            "rope_scaling": None,
            "n_group": 1,
            "topk_group": 1,
            **changes,
        }
    )
    silent = {"scoring_func", "topk_method"} - changes.keys()
    return {key: value for key, value in config.items() if key not in silent}
