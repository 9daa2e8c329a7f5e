"""What llama.cpp calls the indexers of DeepSeek V3.2 (architecture ``deepseek32``) and GLM-5 (``glm-dsa``): all else is
as in ``deepseek2``. Sources: src/models/deepseek32.cpp, glm-dsa.cpp and conversion/deepseek.py, glm.py of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.arch.base import KeyValue
from quantkit.arch.deepseek_v3_gguf import SIGMOID, Dialect

if TYPE_CHECKING:
    from quantkit.arch.deepseek_v32_config import DeepseekV32Config

DEEPSEEK32, GLM_DSA = "deepseek32", "glm-dsa"
INDEXER_TYPES = "attention.indexer.types"
INDEXER_SIZES = {
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk",
}
"""Key of the metadata, without the architecture -> entry of config.json."""
_IN_LAYER = {
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
}
DEFAULTS: Mapping[str, Mapping[str, KeyValue | None]] = {
    DEEPSEEK32: {"attention.q_lora_rank": None, "expert_gating_func": None},
    GLM_DSA: {"attention.q_lora_rank": None, "expert_gating_func": SIGMOID},
}
"""Architecture -> `Dialect.defaults`."""


def deepseek32(config: DeepseekV32Config) -> Dialect:
    """Names and keys of DeepSeek V3.2."""
    faults = _faults(config)
    if not all(map(config.has_indexer, range(config.num_hidden_layers))):
        faults += ("layers share an indexer, llama.cpp computes that for glm-dsa alone",)
    return Dialect(DEEPSEEK32, _IN_LAYER, _sizes(config), DEFAULTS[DEEPSEEK32], faults, _mtp_differences(config))


def glm_dsa(config: DeepseekV32Config) -> Dialect:
    """Names and keys of GLM-5, with which decoder layers have an indexer of their own.

    The kinds are always written: from 1,048,576 positions on llama.cpp takes GLM-5.2's pattern for a file without them.
    """
    faults = _faults(config)
    if config.rope_scaling is not None and config.rope_scaling.factor > 1:
        # glm-dsa.cpp does not read yarn_log_multiplier, so that sine and cosine would be scaled, not the softmax.
        faults += ("rope_scaling has a factor, llama.cpp reads none of yarn's mscale for glm-dsa",)
    full = tuple(map(config.has_indexer, range(config.num_hidden_layers)))
    values = {**_sizes(config), INDEXER_TYPES: full}
    return Dialect(GLM_DSA, _IN_LAYER, values, DEFAULTS[GLM_DSA], faults, _mtp_differences(config))


def _sizes(config: DeepseekV32Config) -> dict[str, KeyValue]:
    return {key: getattr(config, entry) for key, entry in INDEXER_SIZES.items()}


def _mtp_differences(config: DeepseekV32Config) -> tuple[str, ...]:
    """graph_mtp of both has no indexer; seen in logits (tests/convert/test_mtp_llama_cpp.py)."""
    return (
        f"llama.cpp's MTP layer attends to all keys: beyond {config.index_topk:,} tokens it drafts otherwise than the "
        "model's own. What it accepts is the model's choice all the same.",
    )


def _faults(config: DeepseekV32Config) -> tuple[str, ...]:
    """Both graphs find an indexer's unrotated half at the offset of its own width."""
    if config.index_head_dim == 2 * config.qk_rope_head_dim:
        return ()
    return (
        f"index_head_dim {config.index_head_dim} is not twice qk_rope_head_dim {config.qk_rope_head_dim}, as "
        "llama.cpp's indexer takes it to be",
    )
