"""What llama.cpp calls the indexers of DeepSeek V3.2 (architecture ``deepseek32``) and GLM-5 (``glm-dsa``): all else is
as in ``deepseek2``. Sources: src/models/deepseek32.cpp, glm-dsa.cpp and conversion/deepseek.py, glm.py of llama.cpp."""

from __future__ import annotations

from quantkit.arch.deepseek_v3_config import DeepseekV32Config
from quantkit.arch.deepseek_v3_gguf import Dialect

_IN_LAYER = {
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
}


def dialect(architecture: str, config: DeepseekV32Config) -> Dialect:
    """Names and keys of an architecture with indexers."""
    sizes = {
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
    }
    return Dialect(architecture, _IN_LAYER, sizes)
