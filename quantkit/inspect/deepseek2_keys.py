"""Keys that a GGUF file of architecture ``deepseek2`` or a near one lacks: what llama.cpp takes for each, and what
follows.

In: a file's metadata and the names of its tensors. Out: one line for each key that DeepSeek V3 needs. The values are
those of `default_of`; what they lead to follows from src/models/deepseek2.cpp and llm_graph_context::build_moe_ffn of
llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from quantkit.arch.base import KeyValue
from quantkit.arch.deepseek_v3_gguf import DEEPSEEK2, MTP_INPUT, ROUTER, SELECTION_BIAS, SIGMOID, WHOLE_KV_B, Dialect
from quantkit.arch.deepseek_v3_gguf_read import Found, default_of, stores_whole_kv_b
from quantkit.arch.deepseek_v32_gguf import INDEXER_SIZES

V3_EXPERTS = 256
"""Routed experts of V3, V3.1 and R1, whose experts are chosen in groups; models without groups have other numbers."""

_SIZES = (
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.kv_lora_rank",
    "attention.layer_norm_rms_epsilon",
    "attention.q_lora_rank",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
)
"""Without these llama.cpp gives an error or aborts: it needs them, or its default fits no tensor."""
_FIRST_ROUTER = f"blk.0.{ROUTER}"
_SCALING = "rope.scaling."


@dataclass(frozen=True, slots=True)
class _File:
    """Keys without the architecture, names of tensors, and what kind of model it is."""

    found: Found
    names: Collection[str]
    dialect: Dialect

    def lacks(self, key: str) -> bool:
        return self.found(key) is None

    def default(self, key: str) -> KeyValue | None:
        return default_of(key, self.found, self.dialect)

    def holds(self, ending: str) -> bool:
        return any(name.endswith(ending) for name in self.names)

    @property
    def biased(self) -> bool:
        """Whether experts have a selection bias, as in V3 and its descendants and not in V2."""
        return self.holds(f".{SELECTION_BIAS}")

    @property
    def like_v3(self) -> bool:
        return self.biased and self.found("expert_count") == V3_EXPERTS


def missing_keys(get: Callable[[str], object], names: Collection[str], dialect: Dialect = DEEPSEEK2) -> list[str]:
    """A line for each key that is missing. ``get``: key with the architecture -> value, None if it is not there."""
    architecture = dialect.architecture
    file = _File(lambda key: get(f"{architecture}.{key}"), names, dialect)
    indexed = () if dialect == DEEPSEEK2 else INDEXER_SIZES
    parts = (_sizes(file), _heads(file), _experts(file), _rope(file), _needed(file, indexed))
    return [f"{architecture}.{key} is missing: {what}." for part in parts for key, what in part]


def _sizes(file: _File) -> Iterator[tuple[str, str]]:
    for key in filter(file.lacks, _SIZES):
        default = file.default(key)
        if key == "attention.q_lora_rank":
            if default is None:
                yield key, "llama.cpp refuses the file (0 says that there is none)"
        elif default is None:
            yield key, "llama.cpp does not load the file"
        else:
            yield key, f"llama.cpp takes {default} and does not load the file"
    if file.lacks("leading_dense_block_count") and _FIRST_ROUTER not in file.names:
        yield "leading_dense_block_count", "llama.cpp looks for experts in every layer and does not load the file"
    if file.lacks("feed_forward_length") and _FIRST_ROUTER not in file.names:
        yield "feed_forward_length", "llama.cpp takes 0 and does not load the file"
    if file.lacks("nextn_predict_layers") and file.holds(f".{MTP_INPUT}"):
        yield "nextn_predict_layers", "llama.cpp takes the MTP layer for a decoder layer and does not load the file"


def _needed(file: _File, keys: Collection[str]) -> Iterator[tuple[str, str]]:
    return ((key, "llama.cpp does not load the file") for key in keys if file.lacks(key))


def _heads(file: _File) -> Iterator[tuple[str, str]]:
    """Files with kv_b_proj in parts have the sizes of MLA beside those of the cache; older ones only the latter."""
    if stores_whole_kv_b(file.found) and not file.holds(f".{WHOLE_KV_B}"):
        yield "attention.key_length_mla", f"llama.cpp looks for {WHOLE_KV_B} and does not load the file"
        return
    whole = stores_whole_kv_b(file.found)
    for key in ("key_length", "value_length"):
        default = default_of(f"attention.{key}", file.found)
        if file.lacks(f"attention.{key}_mla") and not whole:
            yield f"attention.{key}_mla", "llama.cpp does not load the file"
        if file.lacks(f"attention.{key}") and whole:
            yield f"attention.{key}", f"llama.cpp takes embedding_length / attention.head_count, {default}"
    if whole:
        return
    if file.lacks("attention.key_length"):
        width = default_of("attention.key_length", file.found)
        yield "attention.key_length", f"llama.cpp takes {width} and stops when it makes its cache"
    if file.lacks("attention.head_count_kv") and (heads := default_of("attention.head_count_kv", file.found)) != 1:
        yield "attention.head_count_kv", f"llama.cpp takes {heads} and stops when it makes its cache (MLA has 1)"


def _experts(file: _File) -> Iterator[tuple[str, str]]:
    if file.lacks("expert_weights_scale"):
        yield "expert_weights_scale", "llama.cpp takes 1, what routed experts add is not scaled (DeepSeek V3: 2.5)"
    if not file.biased:
        return
    if file.lacks("expert_weights_norm"):
        yield (
            "expert_weights_norm",
            "llama.cpp takes false, the weights of a token's experts do not sum to 1 (DeepSeek V3: true)",
        )
    gating = file.default("expert_gating_func")
    if file.lacks("expert_gating_func") and gating is None:
        yield "expert_gating_func", "llama.cpp does not load the file"
    elif file.lacks("expert_gating_func") and gating != SIGMOID:
        yield (
            "expert_gating_func",
            "llama.cpp then takes softmax, but experts with a selection bias (exp_probs_b) are gated by sigmoid "
            f"({SIGMOID})",
        )
    if file.like_v3 and not file.found("expert_group_count"):
        yield (
            "expert_group_count",
            "llama.cpp chooses without groups, DeepSeek V3 and R1 among 8 groups of which 4 are used; files of older "
            "converters lack it",
        )
    elif not file.lacks("expert_group_count") and file.lacks("expert_group_used_count"):
        yield "expert_group_used_count", "llama.cpp takes 0 and does not load the file"


def _rope(file: _File) -> Iterator[tuple[str, str]]:
    """Without any key of yarn a model may have none; where some are there, the others are missing."""
    if file.lacks("rope.freq_base"):
        yield "rope.freq_base", "llama.cpp takes 10000, which DeepSeek V3 has (Kimi K2: 50000)"
    parts = ("type", "factor", "original_context_length", "yarn_log_multiplier")
    if all(file.lacks(_SCALING + part) for part in parts):
        if file.like_v3:
            yield f"{_SCALING}type", "llama.cpp does not scale positions (DeepSeek V3: yarn, factor 40)"
        return
    factor = file.found(f"{_SCALING}factor")
    if not isinstance(factor, float) or not 1 < factor < math.inf:
        if file.lacks(f"{_SCALING}factor"):
            yield f"{_SCALING}factor", "llama.cpp takes 1, positions are not scaled (DeepSeek V3: 40)"
        return
    temperature = 1 + 0.1 * math.log(factor)
    consequences = {
        "type": "llama.cpp takes linear, which stretches every frequency (DeepSeek V3: yarn)",
        "original_context_length": (
            f"llama.cpp takes context_length, {default_of(f'{_SCALING}original_context_length', file.found)} "
            "(DeepSeek V3: 4096)"
        ),
        "yarn_log_multiplier": (
            f"llama.cpp takes 0 and multiplies rotated queries and keys by {temperature:.4g} each (DeepSeek V3: 0.1)"
        ),
    }
    for part, consequence in consequences.items():
        if file.lacks(_SCALING + part):
            yield _SCALING + part, consequence
