"""What a GGUF file of llama.cpp's architecture ``deepseek2``, or of ``deepseek32`` and ``glm-dsa`` with their indexers,
should hold, by its own metadata, and the known ways in which such files go wrong without any message when they are run.

Tensors and their shapes are those of the family DeepSeek V3, of which V2 is the special case without a selection bias,
and of DeepSeek V3.2 and GLM-5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial

from quantkit.arch import arch_of
from quantkit.arch.deepseek_v3_gguf import (
    GGUF_ARCHITECTURE,
    KV_B_PARTS,
    LOW_QUERY,
    OLDER,
    OPTIONAL,
    QUERY,
    REPLACED_BY,
    ROUTER,
    SELECTION_BIAS,
    SIGMOID,
    SIZES,
    WHOLE_KV_B,
    Dialect,
)
from quantkit.arch.deepseek_v3_gguf_read import Found, default_of, stores_whole_kv_b
from quantkit.arch.deepseek_v32_gguf import DEEPSEEK32, DEFAULTS, GLM_DSA, INDEXER_SIZES, INDEXER_TYPES
from quantkit.arch.llama_cpp import YARN_BETAS
from quantkit.arch.parts import in_parts, stored_tensors
from quantkit.errors import ConfigError
from quantkit.formats.gguf.reader import GgufReader
from quantkit.inspect.deepseek2_keys import missing_keys
from quantkit.inspect.storage import counted
from quantkit.tensors import Role, TensorSpec

FAMILIES = {
    GGUF_ARCHITECTURE: "DeepseekV3ForCausalLM",
    DEEPSEEK32: "DeepseekV32ForCausalLM",
    GLM_DSA: "GlmMoeDsaForCausalLM",
}
"""Architectures whose tensors are known -> the family that has them."""

_FIXED: dict[str, object] = {
    "n_routed_experts": 2,  # experts are stacked: their number is a dimension
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 1,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def architecture_of(model: GgufReader) -> str:
    """general.architecture, a key of `FAMILIES` for a file of which more is asked here."""
    return str(model.get("general.architecture"))


def prefix_of(model: GgufReader) -> str:
    """What stands before the architecture's keys."""
    return f"{architecture_of(model)}."


def _dialect(model: GgufReader) -> Dialect:
    architecture = architecture_of(model)
    return Dialect(architecture, defaults=DEFAULTS.get(architecture, {}))


def roles(model: GgufReader) -> Callable[[str], Role | None]:
    """A file -> the role of a tensor by its name (`role_of`)."""
    return partial(role_of, model)


def role_of(model: GgufReader, name: str) -> Role | None:
    """The role of a tensor by its name, None for a name that the architecture does not know."""
    block, suffix = _block_and_suffix(name)
    role = _roles(architecture_of(model)).get(suffix)
    if role is None or not block.isascii() or not block.isdigit():
        return role
    layers, mtp = _count(model, "block_count"), _count(model, "nextn_predict_layers") or 0
    return Role.MTP if layers is not None and int(block) >= layers - mtp else role


def oddities(model: GgufReader) -> list[str]:
    """One line for each thing that is missing, contradicts the metadata, or is known to give wrong results, and for
    what costs memory or quality."""
    return [*faults(model), *_costs(model)]


def faults(model: GgufReader) -> list[str]:
    """Those of `oddities` with which llama.cpp does not load the file, or computes otherwise than the model."""
    return [*_tensor_lines(model), *_key_lines(model), *_unread_kv_b(model)]


# ------------------------------------------------------------------------------------------------------------- tensors


def _tensor_lines(model: GgufReader) -> list[str]:
    """Against the table of tensors that the metadata describes."""
    keys = (*SIZES, *_indexer_sizes(model), "block_count", "expert_count", *_head_keys(model))
    unknown = [prefix_of(model) + key for key in keys if _size(model, key) is None]
    if unknown:  # those that are missing have lines of their own
        odd = [key for key in unknown if model.get(key) is not None]
        return [counted("keys that the architecture needs are no whole numbers", odd)] if odd else []
    try:
        expected = _expected(model)
    except ConfigError as error:
        what = error.message.removeprefix("config.json: ")
        return [f"the metadata describes no model of this architecture, in the words of config.json: {what}"]
    tensors = model.tensors
    strange = [name for name in tensors if name not in expected and name.split(".", 2)[-1] not in OLDER]
    shapes = [name for name, spec in expected.items() if name in tensors and tensors[name].shape != spec.shape]
    lines = (
        ("tensors of the architecture are missing", _missing(model, expected)),
        ("tensors that the architecture does not have", strange),
        ("tensors whose shape does not fit the metadata", shapes),
    )
    return [counted(text, names) for text, names in lines if names]


def _missing(model: GgufReader, expected: Mapping[str, TensorSpec]) -> list[str]:
    sigmoid = _count(model, "expert_gating_func") == SIGMOID
    missing: list[str] = []
    for name in expected:
        block, suffix = _block_and_suffix(name)
        replaced = suffix in REPLACED_BY and f"blk.{block}.{REPLACED_BY[suffix]}" in model.tensors
        unneeded = suffix in OPTIONAL or (suffix == SELECTION_BIAS and not sigmoid)
        if name not in model.tensors and not replaced and not unneeded:
            missing.append(name)
    return missing


def _expected(model: GgufReader) -> dict[str, TensorSpec]:
    """Tensors by GGUF name, shapes in numpy's order. Raises `ConfigError` if the metadata describes no model."""
    key, value = (_size(model, key) or 0 for key in _head_keys(model))
    mtp = _count(model, "nextn_predict_layers") or 0
    sizes = {entry: _size(model, found) for found, entry in SIZES.items()}
    rope = sizes["qk_rope_head_dim"] or 0
    layers = (_count(model, "block_count") or 0) - mtp
    return _table(
        architecture_of(model),
        {
            **sizes,
            **{entry: _size(model, found) for found, entry in _indexer_sizes(model).items()},
            "indexer_types": _indexer_kinds(model, layers),
            "vocab_size": _vocabulary(model),
            "num_hidden_layers": layers,
            "num_nextn_predict_layers": mtp,
            "q_lora_rank": _query_rank(model),
            "qk_nope_head_dim": key - rope,
            "v_head_dim": value,
        },
        _count(model, "expert_count") or 0,
    )


def _indexer_sizes(model: GgufReader) -> Mapping[str, str]:
    return {} if architecture_of(model) == GGUF_ARCHITECTURE else INDEXER_SIZES


def _indexer_kinds(model: GgufReader, layers: int) -> list[str]:
    """Of each decoder layer, by the file's list, or by its tensors."""
    listed = model.get(prefix_of(model) + INDEXER_TYPES)
    if isinstance(listed, tuple) and len(listed) == layers:
        full = [bool(entry) for entry in listed]
    else:
        full = [
            f"blk.{layer}.indexer.attn_k.weight" in model.tensors for layer in range(min(layers, len(model.tensors)))
        ]
    return ["full" if own else "shared" for own in full]


def _table(architecture: str, sizes: Mapping[str, object], n_experts: int) -> dict[str, TensorSpec]:
    arch = arch_of({**_FIXED, **sizes, "architectures": [FAMILIES[architecture]]})
    table: dict[str, TensorSpec] = {}
    for name, stored in stored_tensors(in_parts(arch), arch.gguf(), n_experts).items():
        is_router = _block_and_suffix(name)[1] in (ROUTER, SELECTION_BIAS)  # a row for each expert
        shape = (n_experts, *stored.shape[1:]) if is_router else stored.shape
        table[name] = replace(stored.first, shape=shape)
    return table


@lru_cache(maxsize=len(FAMILIES))
def _roles(architecture: str) -> Mapping[str, Role]:
    """Role by the end of a name, from a model with a layer of each kind, once with and once without q_lora_rank."""
    roles: dict[str, Role] = dict(OLDER)
    for rank in (1, None) if architecture == GGUF_ARCHITECTURE else (1,):
        sizes: dict[str, object] = {
            **dict.fromkeys((*SIZES.values(), *INDEXER_SIZES.values()), 2),
            "first_k_dense_replace": 1,
            "q_lora_rank": rank,
        }
        sizes |= {"vocab_size": 1, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
        table = _table(architecture, {**sizes, "qk_nope_head_dim": 1, "v_head_dim": 1}, 2)
        for name, spec in table.items():
            roles.setdefault(_block_and_suffix(name)[1], spec.role)
    return roles


def _block_and_suffix(name: str) -> tuple[str, str]:
    """ "blk.3.ffn_up.weight" -> ("3", "ffn_up.weight"); ("", name) outside the blocks."""
    if not name.startswith("blk."):
        return "", name
    block, _, suffix = name.removeprefix("blk.").partition(".")
    return block, suffix


def _head_keys(model: GgufReader) -> tuple[str, str]:
    """Where the sizes of a key and of a value head are: files from before latent attention have the shorter names."""
    end = "" if stores_whole_kv_b(_found(model)) else "_mla"
    return f"attention.key_length{end}", f"attention.value_length{end}"


def _size(model: GgufReader, key: str) -> int | None:
    """A number of the file, or what llama.cpp takes for it where tensors may have that size."""
    defaulted = key in ("attention.key_length", "attention.value_length") or (
        key == "leading_dense_block_count" and f"blk.0.{ROUTER}" in model.tensors
    )
    if defaulted and model.get(prefix_of(model) + key) is None:
        default = default_of(key, _found(model), _dialect(model))
        return default if isinstance(default, int) else None
    return _count(model, key)


def _found(model: GgufReader) -> Found:
    prefix = prefix_of(model)
    return lambda key: model.get(prefix + key)


def _vocabulary(model: GgufReader) -> int:
    table = model.tensors.get("token_embd.weight")
    return _count(model, "vocab_size") or (table.shape[0] if table is not None else 0)


def _query_rank(model: GgufReader) -> int | None:
    """q_lora_rank; models that have none, or whose number llama.cpp ignores, have attn_q. A key that is missing has a
    line of its own."""
    if f"blk.0.{QUERY}" in model.tensors:
        return None
    low = model.tensors.get(f"blk.0.{LOW_QUERY}")
    return _count(model, "attention.q_lora_rank") or (low.shape[0] if low is not None else None)


def _count(model: GgufReader, key: str) -> int | None:
    found = model.get(prefix_of(model) + key)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


# ------------------------------------------------------------------------------------------------------------ metadata


def _key_lines(model: GgufReader) -> list[str]:
    """Keys whose absence or value changes what is computed, or keeps llama.cpp from loading the file."""
    gating = _count(model, "expert_gating_func")
    lines: list[str] = []
    if _is_biased(model) and gating not in (None, SIGMOID):
        lines.append(
            f"{prefix_of(model)}expert_gating_func is {gating}: experts with a selection bias (exp_probs_b) are gated "
            f"by sigmoid ({SIGMOID})."
        )
    multiplier = model.get(f"{prefix_of(model)}rope.scaling.yarn_log_multiplier")
    if isinstance(multiplier, float) and abs(multiplier) >= 0.5:
        lines.append(
            f"{prefix_of(model)}rope.scaling.yarn_log_multiplier is {multiplier:g}: for this architecture a tenth of "
            "mscale_all_dim is stored (0.1 for DeepSeek V3), llama.cpp multiplies it by ten."
        )
    return [*lines, *missing_keys(model.get, model.tensors, _dialect(model))]


def _is_biased(model: GgufReader) -> bool:
    return any(name.endswith(f".{SELECTION_BIAS}") for name in model.tensors)


# ----------------------------------------------------------------------------------------------------------- attention


def _unread_kv_b(model: GgufReader) -> list[str]:
    """kv_b_proj whole where llama.cpp reads parts."""
    whole = _whole_kv_b(model)
    if not whole or model.get(f"{prefix_of(model)}attention.key_length_mla") is None:
        return []
    text = "with attention.key_length_mla llama.cpp looks for attn_k_b and attn_v_b instead."
    return [f"{counted('layers with kv_b_proj in one tensor', whole)}: {text}"]


def _whole_kv_b(model: GgufReader) -> list[str]:
    return [name for name in model.tensors if name.endswith(f".{WHOLE_KV_B}")]


def _costs(model: GgufReader) -> list[str]:
    """What is computed rightly, at a price; and what a flag of llama-server mends."""
    lines: list[str] = []
    whole = _whole_kv_b(model)
    if whole and model.get(f"{prefix_of(model)}attention.key_length_mla") is None:
        lines.append(
            f"{counted('layers with kv_b_proj in one tensor', whole)}: a file from before latent attention, llama.cpp "
            "caches full keys and values of every head."
        )
    betas = [model.get(f"{prefix_of(model)}rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")]
    if any(isinstance(found, float) and found != read for found, read in zip(betas, YARN_BETAS, strict=True)):
        fast, slow = YARN_BETAS
        lines.append(
            f"{prefix_of(model)}rope.scaling.yarn_beta_fast or _slow is not {fast:g} or {slow:g}: llama.cpp takes "
            "these whatever the file says; start it with --yarn-beta-fast and --yarn-beta-slow of the model."
        )
    parts = [name for name, entry in model.tensors.items() if entry.kind == "MXFP4" and name.endswith(KV_B_PARTS)]
    if parts:
        lines.append(
            f"{counted('parts of kv_b_proj in MXFP4', parts)}: MXFP4_MOE of llama-quantize takes them for experts, "
            "because they have three dimensions; Q8_0 costs little."
        )
    return lines
