"""What llama.cpp takes for metadata that a file of architecture ``deepseek2`` lacks, and the model that it then runs.

In: a file's keys, without "deepseek2." in front, and the checked config of the model that the file should be. Out: the
config and the gating that llama.cpp computes with, or `SourceError` where it does not load the file.

Sources, of llama.cpp: llama_model_base::load_hparams (src/llama-model.cpp) for every architecture,
llama_model_deepseek2::load_arch_hparams and load_arch_tensors (src/models/deepseek2.cpp) for this one, llama_context's
constructor for yarn. The tests leave each key out and compare with llama.cpp itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantkit.arch.base import KeyValue
from quantkit.arch.deepseek_v3_config import DeepseekConfig
from quantkit.arch.deepseek_v3_gguf import DEEPSEEK2, SIGMOID, SOFTMAX, Dialect, is_lite, key_values
from quantkit.arch.rope import LinearScaling
from quantkit.errors import SourceError

Value = KeyValue
Found = Callable[[str], object]
"""Key without the architecture -> the file's value, None if it lacks the key."""

_CONSTANT: Mapping[str, Value] = {
    "feed_forward_length": 0,
    "attention.head_count": 0,
    "attention.key_length_mla": 0,
    "attention.value_length_mla": 0,
    "leading_dense_block_count": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "expert_weights_scale": 1.0,  # 0 in llama_hparams, for which build_moe_ffn scales nothing
    "expert_weights_norm": False,
    "rope.freq_base": 10000.0,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "nextn_predict_layers": 0,
}
_GLM_LAYERS, _GLM_VOCABULARY = (47, 48), 154_880  # GLM 4.7 Flash: the one model whose files may leave sigmoid out
_UNCOMPARED = ("context_length", "vocab_size", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
"""Nothing is computed with the first; the vocabulary's size follows from the tokens; the others are written and not
read (`server_flags`)."""
_COMPUTED = (
    "expert_group_count",
    "expert_weights_scale",
    "expert_weights_norm",
    "expert_gating_func",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_log_multiplier",
)
"""Keys whose absence changes what is computed. Without others tensors have other shapes, and llama.cpp gives up."""

_REWRITE = "Write the key into the file, or convert the checkpoint anew."


def default_of(key: str, found: Found, dialect: Dialect = DEEPSEEK2) -> Value | None:
    """What llama.cpp takes for ``key`` in a file that lacks it, None where it refuses to load such a file."""
    if key in dialect.defaults:
        return dialect.defaults[key]
    match key:
        case "attention.q_lora_rank":
            return 0 if is_lite(_number(found, "block_count"), _number(found, "vocab_size")) else None
        case "attention.head_count_kv":
            return _number(found, "attention.head_count")
        case "attention.key_length" | "attention.value_length":
            heads = _number(found, "attention.head_count")
            return _number(found, "embedding_length") // heads if heads else 0
        case "rope.dimension_count":
            return _number(found, "attention.key_length") or default_of("attention.key_length", found)
        case "rope.scaling.original_context_length":
            return _number(found, "context_length")
        case "expert_gating_func":
            glm = _number(found, "block_count") in _GLM_LAYERS and _number(found, "vocab_size") == _GLM_VOCABULARY
            return SIGMOID if glm else SOFTMAX
        case _:
            return _CONSTANT.get(key)


def stores_whole_kv_b(found: Found) -> bool:
    """Whether llama.cpp looks for kv_b_proj in one tensor (`WHOLE_KV_B`) and caches keys and values of every head, as
    in files from before latent attention: they lack both head sizes of MLA."""
    return not any(found(f"attention.{part}_length_mla") for part in ("key", "value"))


@dataclass(frozen=True, slots=True)
class LlamaCppModel:
    """What llama.cpp runs. ``scaling``: of positions, if it is not that of ``config``; ``notes``: a line for each key
    that is missing and matters."""

    config: DeepseekConfig
    scaling: LinearScaling | None
    whole_kv_b: bool
    notes: tuple[str, ...]


def read_as_llama_cpp(config: DeepseekConfig, found: Found, dialect: Dialect = DEEPSEEK2) -> LlamaCppModel:
    """The model of ``config`` as llama.cpp computes it from a file with these keys.

    Raises SourceError for a key that contradicts the config, and for a missing one without which llama.cpp does not
    load the file. The message begins with the key.
    """
    if found("context_length") is None:
        raise SourceError(f"lacks {dialect.architecture}.context_length: llama.cpp does not load it.", hint=_REWRITE)
    whole = stores_whole_kv_b(found)
    needed = _needed(config, dialect, whole=whole, mtp=bool(found("nextn_predict_layers")))
    taken: dict[str, Value] = {}
    for key, value in needed.items():
        present = found(key)
        if present is not None and not _same(present, value):
            raise SourceError(
                f"{dialect.architecture}.{key} is {present!r:.60}, config.json needs {value!r}.",
                hint="It is another model, or was converted with other settings.",
            )
        taken[key] = value if present is not None else _taken(key, value, found, dialect)
    absent = {key: value for key, value in taken.items() if not _same(value, needed[key])}
    notes = tuple(
        f"Lacks {dialect.architecture}.{key}: computed as llama.cpp does, with {_written(value)} "
        f"(config.json: {_written(needed[key])})."
        for key, value in absent.items()
    )
    changes = _changes(config, taken) if absent else {}
    return LlamaCppModel(_changed(config, changes), _linear(taken), whole, notes)


def _changed(config: DeepseekConfig, changes: Mapping[str, object]) -> DeepseekConfig:
    """Routing by softmax is no config of every family, but llama.cpp computes it."""
    checked = DeepseekConfig.of({**config.model_dump(), **changes})
    return config.model_copy(update={name: getattr(checked, name) for name in changes})


def _needed(config: DeepseekConfig, dialect: Dialect, *, whole: bool, mtp: bool) -> dict[str, Value]:
    """The keys of a file of this model that llama.cpp reads, with the values that run it rightly."""
    prefix = f"{dialect.architecture}."
    values = {
        key.removeprefix(prefix): value
        for key, value in key_values(config, mtp=mtp, dialect=dialect).items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in _UNCOMPARED
    }
    values = {"expert_weights_norm": False, "rope.scaling.factor": 1.0, **values}
    if whole:
        del values["attention.key_length_mla"], values["attention.value_length_mla"]
        values |= {"attention.key_length": config.qk_head_dim, "attention.value_length": config.v_head_dim}
        values["attention.head_count_kv"] = config.num_attention_heads
    else:
        del values["attention.value_length"]  # of the cache: values are a part of the keys there
    return values


def _taken(key: str, needed: Value, found: Found, dialect: Dialect) -> Value:
    """llama.cpp's default for a missing key. Raises SourceError if it does not run the model with it."""
    if key == "expert_group_used_count" and found("expert_group_count") is None:
        return needed  # not asked for without groups
    value = default_of(key, found, dialect)
    if value is not None and (key in _COMPUTED or _same(value, needed)):
        return value
    takes = "needs it" if value is None else f"takes {_written(value)} for it (config.json: {_written(needed)})"
    raise _refused(key, takes, dialect)


def _refused(key: str, why: str, dialect: Dialect) -> SourceError:
    return SourceError(
        f"lacks {dialect.architecture}.{key}: llama.cpp {why} and does not load the file.", hint=_REWRITE
    )


def _changes(config: DeepseekConfig, taken: Mapping[str, Value]) -> dict[str, object]:
    """Entries of config.json that say what llama.cpp computes."""
    changes: dict[str, object] = {
        "norm_topk_prob": taken["expert_weights_norm"],
        "routed_scaling_factor": taken["expert_weights_scale"],
        "scoring_func": "sigmoid" if taken["expert_gating_func"] == SIGMOID else "softmax",
        "rope_theta": taken["rope.freq_base"],
        "rope_scaling": _rope_scaling(config, taken),
    }
    if not taken.get("expert_group_count"):
        changes |= {"n_group": 1, "topk_group": 1}
    return changes


def _rope_scaling(config: DeepseekConfig, taken: Mapping[str, Value]) -> dict[str, object] | None:
    """Without yarn_log_multiplier sine, cosine and the root of the softmax scale are all multiplied by yarn's factor;
    with it only the softmax scale is (llama_context's constructor and the graph of deepseek2.cpp)."""
    yarn, factor = config.rope_scaling, _float(taken, "rope.scaling.factor")
    if yarn is None or factor == 1 or taken["rope.scaling.type"] != "yarn":
        return None
    original = taken["rope.scaling.original_context_length"]
    scaling: dict[str, object] = {**yarn.model_dump(), "original_max_position_embeddings": original}
    if not taken["rope.scaling.yarn_log_multiplier"]:
        scaling |= {"mscale": None, "mscale_all_dim": 1.0, "attention_factor": 0.1 * math.log(factor) + 1}
    return scaling


def _linear(taken: Mapping[str, Value]) -> LinearScaling | None:
    """The scaling of a file that names none beside its factor. Sine and cosine are not multiplied, but the graph takes
    back a factor of yarn that llama_context has not put on, and then puts on that of yarn_log_multiplier."""
    factor = _float(taken, "rope.scaling.factor")
    if factor == 1 or taken.get("rope.scaling.type") != "linear":
        return None
    log = 0.1 * math.log(factor)
    # A tenth of mscale_all_dim is stored.
    mscale = (1 + log) * (1 + 10 * _float(taken, "rope.scaling.yarn_log_multiplier") * log)
    return LinearScaling(factor, mscale**2)


def _float(taken: Mapping[str, Value], key: str) -> float:
    value = taken.get(key, 0.0)
    assert isinstance(value, int | float), key
    return value


def _number(found: Found, key: str) -> int:
    """An integer of the file, 0 for what is none."""
    value = found(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _same(found: object, needed: Value) -> bool:
    """Floats are stored as float32."""
    if isinstance(found, int | float) and isinstance(needed, float):
        return math.isclose(found, needed, rel_tol=1e-6, abs_tol=1e-30)
    return found == needed


def _written(value: Value) -> str:
    """As it stands in metadata: true, 2.5, yarn."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
