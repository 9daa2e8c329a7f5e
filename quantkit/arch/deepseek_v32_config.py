"""config.json of the families with DeepSeek V3.2's indexers, checked."""

from __future__ import annotations

from quantkit.arch.deepseek_v3_config import Count, DeepseekV3Config, Size


class DeepseekV32Config(DeepseekV3Config):
    """DeepSeek V3's, with the sizes of the indexer."""

    q_lora_rank: Size  # pyright: ignore[reportIncompatibleVariableOverride]
    index_n_heads: Count
    index_head_dim: Size
    index_topk: Size
