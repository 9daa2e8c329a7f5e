"""Architectures near the known ones, and what each has that is not computed here: for the message that refuses them.

A family is known by its name, never by how alike its config.json looks: most of these have DeepSeek's entries and would
be computed wrongly without a word. Sources: the model files of transformers 5.23 and vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping

_GQA = "grouped-query attention"
_DELTA_NET = "layers of gated delta nets and gated attention"
_KDA = "layers of Kimi delta attention, and latent attention without positions"

NOT_COMPUTED: Mapping[str, str] = {
    "AXK1ForCausalLM": "a norm of what the experts give (post_mlp_layernorm)",
    "DeepseekV4ForCausalLM": "compressed keys beside a window, four residual streams, and experts by token id",
    "DeepseekV4ForConditionalGeneration": "compressed keys beside a window, four residual streams, and experts by "
    "token id",
    "DeepseekV41ForCausalLM": "what DeepSeek V4 has, and embeddings of n-grams",
    "Ernie4_5_MoeForCausalLM": f"{_GQA}, and experts chosen by a biased softmax",
    "Glm4MoeForCausalLM": f"{_GQA}, half of each head rotated",
    "Glm5NextForCausalLM": f"{_KDA}, several residual streams, and a pooled indexer",
    "Glm5NextForConditionalGeneration": f"{_KDA}, several residual streams, and a pooled indexer",
    "GptOssForCausalLM": f"{_GQA} with sinks, biases, a clamped gate, and experts fused in one tensor",
    "HYV3ForCausalLM": _GQA,
    "KimiK3ForConditionalGeneration": f"{_KDA}, attention over earlier layers, and experts behind a latent",
    "KimiLinearForCausalLM": _KDA,
    "Llama4ForCausalLM": "attention in chunks, and experts fused in one tensor",
    "Llama4ForConditionalGeneration": "attention in chunks, and experts fused in one tensor",
    "LlamaForCausalLM": f"{_GQA} (only models with experts and latent attention are)",
    "MiniMaxM2ForCausalLM": f"{_GQA}, norms over all heads",
    "Mistral4ForCausalLM": "a temperature of attention that grows with the position",
    "MistralLarge3ForCausalLM": "a temperature of attention that grows with the position, and Mistral's tensor names",
    "MixtralForCausalLM": _GQA,
    "Qwen2ForCausalLM": f"{_GQA} (only models with experts and latent attention are)",
    "Qwen3ForCausalLM": f"{_GQA} (only models with experts and latent attention are)",
    "Qwen3MoeForCausalLM": _GQA,
    "Qwen3NextForCausalLM": _DELTA_NET,
    "Qwen3_5MoeForCausalLM": f"{_DELTA_NET}, and experts fused in one tensor",
    "Qwen3_5MoeForConditionalGeneration": f"{_DELTA_NET}, and experts fused in one tensor",
}
"""Name in ``architectures`` -> what the model has, to be read after "has" and before "which is not computed"."""
