"""What llama-quantize's mixes give to keys and values of attention (attn_k, attn_v), by how many queries share them.

Source: llama_tensor_get_type_impl in src/llama-quant.cpp of llama.cpp. It counts attn_v tensors in the order of layers,
of which each has one, so that the count is the layer's number.
"""

from __future__ import annotations

from dataclasses import dataclass

LARGE = {"llama": 80, "qwen2": 80}
"""Architecture -> blocks of the model that llama.cpp knows as a 70B (LLM_TYPE_70B), where queries share keys."""
MANY_SHARE = 4
"""Queries that share a value, or experts, from which on some mixes take more bits."""
_EIGHT = 8
"""Mixtral's experts."""
_LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
_LOW_VALUES = {"IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
_SHARED_VALUES = {
    **dict.fromkeys(("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), "Q4_K"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "Q5_K"),
}
_VALUES = {"Q2_K": "Q3_K", "IQ3_M": "Q4_K", "Q3_K_L": "Q5_K"}
_KEYS = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """``sharing``: queries for each key and value; ``large``: see `LARGE`."""

    sharing: int = 1
    large: bool = False

    @classmethod
    def of(cls, architecture: str, n_blocks: int, heads: int, kv_heads: int) -> AttentionSizes:
        """Of a file's architecture, block_count, and the two head counts."""
        return cls(heads // kv_heads, LARGE.get(architecture) == n_blocks and heads != kv_heads)


def key_type(preset: str, default: str, n_experts: int) -> str:
    """Type of attn_k."""
    if n_experts == _EIGHT:
        return "Q4_K" if preset in _LOW else "Q8_0"
    return _KEYS.get(preset, default)


def value_type(
    preset: str, default: str, sizes: AttentionSizes, n_experts: int, *, importance: bool, layer: int, more_bits: bool
) -> str:
    """Type of attn_v. ``more_bits``: llama-quantize's use_more_bits of this layer."""
    if preset in _LOW:
        many = sizes.sharing >= MANY_SHARE or n_experts >= MANY_SHARE
        return "Q4_K" if many else _LOW_VALUES.get(preset, "Q2_K")
    kind = _VALUES.get(preset, default)
    if preset in _SHARED_VALUES and sizes.sharing >= MANY_SHARE:
        kind = _SHARED_VALUES[preset]
    elif preset == "IQ3_XXS" and not importance:
        kind = "IQ3_S"
    elif preset == "Q3_K_M":
        kind = "Q5_K" if layer < 2 else "Q4_K"
    elif preset in ("Q4_K_M", "Q5_K_M") and more_bits:
        kind = "Q6_K"
    elif preset == "Q4_K_S" and layer < 4:
        kind = "Q5_K"
    if sizes.large and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if n_experts == _EIGHT else kind
