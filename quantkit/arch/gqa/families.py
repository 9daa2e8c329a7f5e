"""The families of grouped-query attention: a row each. Sources: the model files of transformers 5.23, vLLM 0.33 and
llama.cpp, and the official config.json of each.

A model whose layer computes anything else than `Gqa` says from its row belongs elsewhere, or is named in `unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

from quantkit.arch.base import ArchFactory, MlpNames
from quantkit.arch.gqa.family import GqaFamily, LlamaCppForm, MoeNames, Raw
from quantkit.arch.gqa.model import Gqa

_SOFTMAX: Raw = {"scoring_func": "softmax", "norm_topk_prob": True}
_SIGMOID: Raw = {"scoring_func": "sigmoid", "selection_bias": True}
_NO_WINDOW: Raw = {"use_sliding_window": False}
_NO_BIASES: Raw = {"attention_bias": False, "mlp_bias": False}
_MIXTRAL = MoeNames(block="block_sparse_moe.", bias="e_score_correction_bias", expert=MlpNames("w1", "w3", "w2"))


def _number(raw: Raw, key: str, default: int) -> int:
    """Of a config.json, which may leave it out; what is no number is refused with the other entries, or computes
    nothing."""
    found = raw.get(key)
    return found if isinstance(found, int) and not isinstance(found, bool) else default


def _qwen3(raw: Raw) -> Raw:
    step, listed = max(1, _number(raw, "decoder_sparse_step", 1)), raw.get("mlp_only_layers")
    alone = set(listed) if isinstance(listed, list) else set[object]()
    layers = range(_number(raw, "num_hidden_layers", 0))
    return {"dense_layers": frozenset(n for n in layers if n in alone or (n + 1) % step)}


def _first_dense(raw: Raw) -> Raw:
    first = min(_number(raw, "first_k_dense_replace", 1), _number(raw, "num_hidden_layers", 0))
    return {"dense_layers": frozenset(range(first))}


def _hy3(raw: Raw) -> Raw:
    kinds = raw.get("mlp_layer_types")
    if not isinstance(kinds, list):
        return _first_dense(raw)
    return {"dense_layers": frozenset(n for n, kind in enumerate(cast("list[object]", kinds)) if kind != "sparse")}


def _ernie(raw: Raw) -> Raw:
    layers = _number(raw, "num_hidden_layers", 0)
    first, last = _number(raw, "moe_layer_start_index", 1), _number(raw, "moe_layer_end_index", -1)
    step, last = max(1, _number(raw, "moe_layer_interval", 1)), layers - 1 if last == -1 else last
    return {"dense_layers": frozenset(n for n in range(layers) if n < first or n > last or (n + 1) % step)}


def _glm4(raw: Raw) -> Raw:
    return {**_first_dense(raw), "qk_norm": "head" if raw.get("use_qk_norm") else "none"}


FAMILIES: Mapping[str, GqaFamily] = {
    "Qwen3MoeForCausalLM": GqaFamily(
        LlamaCppForm("qwen3moe", routing=_SOFTMAX),
        entries={"n_routed_experts": "num_experts"},
        unsaid={"norm_topk_prob": False},
        fixed={"qk_norm": "head", "scoring_func": "softmax"},
        only={**_NO_WINDOW, "attention_bias": False},
        derived=_qwen3,
    ),
    "Glm4MoeForCausalLM": GqaFamily(
        LlamaCppForm("glm4moe", mlp_norm="post_attention_norm.weight", leading_dense=True, mtp=True),
        entries={"qkv_bias": "attention_bias"},
        unsaid={"rotated": 0.5, "n_shared_experts": 1},
        fixed=_SIGMOID,
        derived=_glm4,
    ),
    "MixtralForCausalLM": GqaFamily(
        LlamaCppForm("llama", permuted=True, routing=_SOFTMAX),
        _MIXTRAL,
        entries={"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        unsaid={"rope_theta": 1e6},
        fixed=_SOFTMAX,
        only={"sliding_window": None},
    ),
    "MiniMaxM2ForCausalLM": GqaFamily(
        LlamaCppForm("minimax-m2", routing={"norm_topk_prob": True}),
        _MIXTRAL,
        entries={"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        unsaid={"rope_theta": 5e6},
        fixed={**_SIGMOID, "norm_topk_prob": True, "qk_norm": "flat"},
        only={"use_qk_norm": True, "use_routing_bias": True, "scoring_func": "sigmoid", "sliding_window": None},
    ),
    "HYV3ForCausalLM": GqaFamily(
        LlamaCppForm("hy_v3", leading_dense=True, mtp=True, bias="exp_probs_b"),
        MoeNames(router="router.gate.weight", bias="expert_bias", shared="shared_mlp."),
        entries={
            "n_routed_experts": "num_experts",
            "n_shared_experts": "num_shared_experts",
            "norm_topk_prob": "route_norm",
            "routed_scaling_factor": "router_scaling_factor",
        },
        unsaid={"rope_theta": 11_158_840.0, "n_shared_experts": 1},
        fixed={**_SIGMOID, "qk_norm": "head"},
        only=_NO_BIASES,
        derived=_hy3,
        mtp_norm="final_layernorm",
    ),
    "Ernie4_5_MoeForCausalLM": GqaFamily(
        LlamaCppForm("ernie4_5-moe", routing=_SOFTMAX, leading_dense=True, keys={"interleave_moe_layer_step": 1}),
        MoeNames(bias="moe_statics.e_score_correction_bias", bias_row=True),
        entries={
            "n_routed_experts": "moe_num_experts",
            "n_shared_experts": "moe_num_shared_experts",
            "num_experts_per_tok": "moe_k",
        },
        unsaid={"rope_theta": 5e5, "tie_word_embeddings": True},
        fixed={**_SOFTMAX, "selection_bias": True, "rope_interleave": True, "num_nextn_predict_layers": 0},
        only={"use_bias": False},
        derived=_ernie,
    ),
    "LlamaForCausalLM": GqaFamily(LlamaCppForm("llama", permuted=True), only=_NO_BIASES, routed=False),
    "Qwen2ForCausalLM": GqaFamily(LlamaCppForm("qwen2"), fixed={"qkv_bias": True}, only=_NO_WINDOW, routed=False),
    "Qwen3ForCausalLM": GqaFamily(
        LlamaCppForm("qwen3"), fixed={"qk_norm": "head"}, only={**_NO_WINDOW, **_NO_BIASES}, routed=False
    ),
}
"""Name in ``architectures`` -> what it is."""

FACTORIES: Mapping[str, ArchFactory] = {name: partial(Gqa.of, family) for name, family in FAMILIES.items()}
"""The same as `ARCHS` has them."""
