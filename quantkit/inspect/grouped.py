"""What a GGUF file of grouped-query attention should hold, by its own metadata: the architectures of `FAMILIES`.

Sizes come from the keys; whether there are biases, norms of queries and keys, a head or a selection bias is seen in the
first layer that could have them, and asked of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from quantkit.arch.gqa.families import FAMILIES
from quantkit.arch.gqa.family import GqaFamily
from quantkit.arch.gqa.gguf import OPTIONAL, ROPE_FACTORS
from quantkit.arch.gqa.model import Gqa
from quantkit.arch.parts import in_parts, stored_tensors
from quantkit.errors import ConfigError
from quantkit.formats.gguf.reader import GgufReader
from quantkit.inspect.storage import counted
from quantkit.tensors import Role, TensorSpec

ARCHITECTURES = tuple(dict.fromkeys(family.llama_cpp.architecture for family in FAMILIES.values()))
"""llama.cpp's names of those whose tensors are known."""

_SIZES = ("block_count", "context_length", "embedding_length", "attention.head_count")
_EXPERT_SIZES = ("expert_used_count",)
_ROUTER, _NORM, _HEAD = "ffn_gate_inp.weight", "attn_q_norm.weight", "output.weight"
_DERIVED = (ROPE_FACTORS,)
"""Tensors that a file may have beside the model's: factors of frequencies."""
_TWO = 2
"""Experts that the table is made of: they are stacked, so their number is a dimension."""


def oddities(model: GgufReader) -> list[str]:
    """Nothing is known of these that is odd and not wrong."""
    return faults(model)


def faults(model: GgufReader) -> list[str]:
    """One line for each thing with which llama.cpp does not load the file, or computes otherwise than the model."""
    return [*_missing_keys(model)] or _tensor_lines(model)


def roles(model: GgufReader) -> Callable[[str], Role | None]:
    """The role of a tensor by its name, None for a name that the architecture does not know."""
    try:
        known = {name: spec.role for name, spec in _expected(model).items()}
    except ConfigError:
        known = dict[str, Role]()
    return {**known, **dict.fromkeys(_DERIVED, Role.NORM)}.get


def _missing_keys(model: GgufReader) -> Iterator[str]:
    needed = (*_SIZES, "attention.layer_norm_rms_epsilon", *(_EXPERT_SIZES if _number(model, "expert_count") else ()))
    for key in needed:
        if model.get(f"{_architecture(model)}.{key}") is None:
            yield f"{_architecture(model)}.{key} is missing: llama.cpp does not load the file."


def _tensor_lines(model: GgufReader) -> list[str]:
    """Against the table of tensors that the metadata describes."""
    try:
        expected = _expected(model)
    except ConfigError as error:
        what = error.message.removeprefix("config.json: ")
        return [f"the metadata describes no model of this architecture, in the words of config.json: {what}"]
    tensors = model.tensors
    missing = [name for name in expected if name not in tensors and not name.endswith(OPTIONAL)]
    strange = [name for name in tensors if name not in expected and name not in _DERIVED]
    shapes = [name for name, spec in expected.items() if name in tensors and tensors[name].shape != spec.shape]
    lines = (
        ("tensors of the architecture are missing", missing),
        ("tensors that the architecture does not have", strange),
        ("tensors whose shape does not fit the metadata", shapes),
    )
    return [counted(text, names) for text, names in lines if names]


def _expected(model: GgufReader) -> Mapping[str, TensorSpec]:
    """Tensors by GGUF name, shapes in numpy's order. Raises `ConfigError` if the metadata describes no model."""
    family, experts = _family(model), _number(model, "expert_count")
    arch = Gqa(family, family.checked(_entries(model, family, experts)))
    table: dict[str, TensorSpec] = {}
    for name, stored in stored_tensors(in_parts(arch), arch.gguf(), experts).items():
        shape = stored.shape
        if name.endswith(_ROUTER):  # a row for each expert
            shape = (experts, *shape[1:])
        elif name.endswith(family.llama_cpp.bias):
            shape = (*shape[:-1], experts)
        table[name] = replace(stored.first, shape=shape)
    return table


def _family(model: GgufReader) -> GqaFamily:
    """Of several with one architecture that with experts, or that without."""
    found = [family for family in FAMILIES.values() if family.llama_cpp.architecture == _architecture(model)]
    routed = bool(_number(model, "expert_count"))
    return next((family for family in found if family.routed == routed), found[0])


def _entries(model: GgufReader, family: GqaFamily, experts: int) -> dict[str, object]:
    heads, hidden = _number(model, "attention.head_count"), _number(model, "embedding_length")
    head_dim = _number(model, "attention.key_length") or (hidden // heads if heads else 0)
    mtp, norm = _number(model, "nextn_predict_layers"), model.tensors.get(f"blk.0.{_NORM}")
    table = model.tensors.get("token_embd.weight")
    wide = norm is not None and norm.shape[-1] != head_dim
    return {
        "hidden_size": hidden,
        "vocab_size": table.shape[0] if table is not None else 0,
        "num_hidden_layers": _number(model, "block_count") - mtp,
        "num_nextn_predict_layers": mtp,
        "intermediate_size": _number(model, "feed_forward_length") or 1,  # without it no layer is dense
        "num_attention_heads": heads,
        "num_key_value_heads": _number(model, "attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "rotary_dim": _number(model, "rope.dimension_count") or head_dim,
        "qkv_bias": "blk.0.attn_q.bias" in model.tensors,
        "qk_norm": "none" if norm is None else "flat" if wide else "head",
        "max_position_embeddings": 1,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": _HEAD not in model.tensors,
        **(_expert_entries(model, family.llama_cpp.bias) if experts else {}),
    }


def _expert_entries(model: GgufReader, bias: str) -> dict[str, object]:
    width = _number(model, "expert_feed_forward_length") or _number(model, "feed_forward_length")
    shared = _number(model, "expert_shared_feed_forward_length")
    return {
        "n_routed_experts": _TWO,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": width,
        "n_shared_experts": _number(model, "expert_shared_count") or shared // max(1, width),
        "dense_layers": frozenset(range(min(_number(model, "leading_dense_block_count"), len(model.tensors)))),
        "selection_bias": any(name.endswith(bias) for name in model.tensors),
    }


def _architecture(model: GgufReader) -> str:
    return str(model.get("general.architecture"))


def _number(model: GgufReader, key: str) -> int:
    """A whole number of the file, 0 for none."""
    found = model.get(f"{_architecture(model)}.{key}")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0
