"""Architectures near the known ones, and what each has that is not computed here: for the message that refuses them.

A family is known by its name, never by how alike its config.json looks: most of these have DeepSeek's entries and would
be computed wrongly without a word. Sources: the model files of transformers 5.23 and vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping

_GQA = "grouped-query attention"
_DELTA_NET = "layers of gated delta nets and gated attention"
_DENSE = "no experts but dense MLPs in all layers"
_TEMPERATURE = "a temperature of attention that grows with the position, experts chosen by a normalised softmax"
_KDA = "layers of Kimi delta attention, and latent attention without positions"

NOT_COMPUTED: Mapping[str, str] = {
    "AXK1ForCausalLM": "a norm of what the experts give (post_mlp_layernorm)",
    "AXK2ForCausalLM": "norms with gates (gated_norm_rank), and queries with gates of the attention's output",
    "BailingHybridForCausalLM": "layers of linear attention beside latent attention",
    "DeepseekV4ForCausalLM": "compressed keys beside a window, four residual streams, and experts by token id",
    "DeepseekV4ForConditionalGeneration": "compressed keys beside a window, four residual streams, and experts by "
    "token id",
    "DeepseekV41ForCausalLM": "what DeepSeek V4 has, and embeddings of n-grams",
    "Dots3NoteForCausalLM": "latent attention with gates and, in most layers, a window",
    "Dots3NoteForConditionalGeneration": "latent attention with gates and, in most layers, a window",
    "Glm5NextForCausalLM": f"{_KDA}, several residual streams, and a pooled indexer",
    "Glm5NextForConditionalGeneration": f"{_KDA}, several residual streams, and a pooled indexer",
    "GptOssForCausalLM": f"{_GQA} with sinks, biases, a clamped gate, and experts fused in one tensor",
    "HYV4ForCausalLM": "several residual streams, and attention with sinks and gates",
    "KimiK3ForConditionalGeneration": f"{_KDA}, attention over earlier layers, and experts behind a latent",
    "KimiLinearForCausalLM": _KDA,
    "Llama4ForCausalLM": "attention in chunks, and experts fused in one tensor",
    "Llama4ForConditionalGeneration": "attention in chunks, and experts fused in one tensor",
    "LongcatFlashForCausalLM": "two attentions in a layer, a shortcut past experts, and experts without weights",
    "MiniCPM3ForCausalLM": _DENSE,
    "Mistral3ForConditionalGeneration": f"Mistral's attention: {_GQA}, or that of Mistral Small 4, which has "
    f"{_TEMPERATURE}, and experts fused in one tensor",
    "Mistral4ForCausalLM": f"{_TEMPERATURE}, and experts fused in one tensor",
    "MistralLarge3ForCausalLM": f"{_TEMPERATURE}, and Mistral's tensor names",
    "MistralLarge4ForConditionalGeneration": "layers that share keys and values, layers without positions, and capped "
    "logits",
    "PanguUltraMoEForCausalLM": "norms behind attention and experts (sandwich_norm)",
    "Qwen3NextForCausalLM": _DELTA_NET,
    "Qwen3_5MoeForCausalLM": f"{_DELTA_NET}, and experts fused in one tensor",
    "Qwen3_5MoeForConditionalGeneration": f"{_DELTA_NET}, and experts fused in one tensor",
    "SarvamMLAForCausalLM": "groups of experts that config.json does not state (vLLM takes one, Sarvam's code 16)",
    "YoutuForCausalLM": _DENSE,
}
"""Name in ``architectures`` -> what the model has, to be read after "has" and before "which is not computed"."""
