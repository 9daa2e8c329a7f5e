"""What llama.cpp calls a decoder of grouped-query attention: tensor names, metadata, and what it takes for granted.

Sources: src/models/*.cpp of each architecture, src/llama-model.cpp (keys of all) and conversion/ of llama.cpp. The
tests hold the names against gguf-py's `TensorNameMap` and load each family in llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from quantkit.arch.base import GgufReading, KeyValue, ModelArch
from quantkit.arch.gqa.config import GqaConfig
from quantkit.arch.gqa.family import GqaFamily
from quantkit.arch.llama_cpp import MAX_EXPERTS, MAX_LAYERS, yarn_difference, yarn_flags
from quantkit.arch.parts import in_parts
from quantkit.arch.rope import Linear, Llama3, Yarn
from quantkit.errors import ConfigError, SourceError

GATING = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}  # LLAMA_EXPERT_GATING_FUNC_TYPE_...
ROPE_FACTORS = "rope_freqs.weight"
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ATTENTION = {
    **{f"{name}_proj.{end}": f"attn_{name}.{end}" for name in "qkv" for end in ("weight", "bias")},
    **{f"{name}_proj.weight:pairs": f"attn_{name}.weight" for name in "qk"},
    **{f"{name}_norm.weight": f"attn_{name}_norm.weight" for name in "qk"},
    "o_proj.weight": "attn_output.weight",
}
_MTP = {
    "embed_tokens.weight": "nextn.embed_tokens.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
}
OPTIONAL = ("nextn.embed_tokens.weight", "nextn.shared_head_norm.weight", "nextn.shared_head_head.weight")
"""Of an MTP layer: where they are missing, llama.cpp takes the main model's."""
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")
_EXPERT = re.compile(r"(0|[1-9][0-9]{0,5})\.(.+)")
_UNCOMPARED = ("context_length", "vocab_size", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
"""Nothing is computed with the first; the vocabulary's size follows from the tokens; the others are written and not
read."""
_DEFAULTS: Mapping[str, KeyValue] = {
    "feed_forward_length": 0,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": False,
    "leading_dense_block_count": 0,
    "rope.freq_base": 10000.0,
}
"""What llama.cpp takes for a key that a file lacks."""


@dataclass(frozen=True, slots=True)
class GqaGguf:
    """A `GgufModel`. ``arch``: the model that ``family`` and ``config`` make."""

    family: GqaFamily
    config: GqaConfig
    arch: ModelArch

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return self.family.llama_cpp.architecture

    def stored_name(self, name: str) -> tuple[str, int | None]:
        """The GGUF name of an official tensor or of a part (`Gqa.parts`), and its place in a stacked expert tensor.

        Raises SourceError for a name that the architecture has no place for.
        """
        if (stored := _TOP.get(name)) is not None:
            return stored, None
        if match := _LAYER.fullmatch(name):
            layer, rest = match.groups()
            stored, place = self._in_layer(rest)
            if stored is not None:
                return f"blk.{layer}.{stored}", place
        raise SourceError(f"{name}: a GGUF file of architecture {self.architecture} has no place for this tensor.")

    def _in_layer(self, name: str) -> tuple[str | None, int | None]:
        """Of a tensor by its name inside a layer; None if there is no place."""
        form, moe = self.family.llama_cpp, self.family.moe
        if name.startswith("self_attn."):
            return _ATTENTION.get(name.removeprefix("self_attn.")), None
        experts = f"{moe.block}{moe.experts}"
        if name.startswith(experts) and (match := _EXPERT.fullmatch(name.removeprefix(experts))):
            kind = {getattr(moe.expert, one): one for one in ("gate", "up", "down")}.get(
                match[2].removesuffix(".weight")
            )
            return (None, None) if kind is None else (f"ffn_{kind}_exps.weight", int(match[1]))
        plain = {
            **_MTP,
            f"{self.family.mtp_norm}.weight": "nextn.shared_head_norm.weight",
            "input_layernorm.weight": "attn_norm.weight",
            "post_attention_layernorm.weight": form.mlp_norm,
            f"{moe.block}{moe.router}": "ffn_gate_inp.weight",
            f"{moe.block}{moe.bias}": form.bias,
            **{
                f"{moe.block}{moe.shared}{one}_proj.weight": f"ffn_{one}_shexp.weight" for one in ("gate", "up", "down")
            },
            **{f"mlp.{one}_proj.weight": f"ffn_{one}.weight" for one in ("gate", "up", "down")},
        }
        return plain.get(name), None

    def key_values(self, *, mtp: bool) -> dict[str, KeyValue]:
        """general.architecture, general.type and every key of the architecture.

        ``mtp``: the file holds the MTP layer. Raises ConfigError for what llama.cpp would refuse or compute otherwise.
        """
        if faults := [*self._faults(mtp=mtp)]:
            raise ConfigError(
                f"config.json: {'; '.join(faults)}.",
                hint="llama.cpp cannot run this model: choose another output format.",
            )
        values = {**self._sizes(mtp=mtp), **self._experts(), **self._scaling()}
        named = {f"{self.architecture}.{key}": value for key, value in values.items()}
        return {"general.architecture": self.architecture, "general.type": "model", **named}

    def read(self, found: Callable[[str], object]) -> GgufReading:
        """A file with these keys is this model, or is refused: a missing key counts as what llama.cpp takes for it."""
        prefix = f"{self.architecture}."
        mtp = bool(found(f"{prefix}nextn_predict_layers"))
        taken_for_granted = self._granted()
        for key, value in self.key_values(mtp=mtp).items():
            short = key.removeprefix(prefix)
            if short == key or short in _UNCOMPARED or short in taken_for_granted:
                continue
            present = found(key)
            taken = self._default(short, found) if present is None else present
            if not _same(taken, value):
                what = "is missing" if present is None else f"is {present!r:.60}"
                raise SourceError(
                    f"{key} {what}, config.json needs {value!r}.",
                    hint="It is another model, or was converted with other settings.",
                )
        return GgufReading(self.arch, in_parts(self.arch), ())

    def differences(self, *, mtp: bool) -> tuple[str, ...]:
        """What llama.cpp computes otherwise than the model, one line each."""
        return yarn_difference(self.config.rope, self.architecture)

    def constants(self) -> Mapping[str, tuple[float, ...]]:
        """What the frequencies of Llama 3.1 and later are divided by."""
        c, scaling = self.config, self.config.rope_scaling
        return {ROPE_FACTORS: scaling.divisors(c.rotary_dim, c.rope_theta)} if isinstance(scaling, Llama3) else {}

    def server_flags(self) -> tuple[str, ...]:
        """Yarn's ramp, where it is not the one that llama.cpp assumes."""
        return yarn_flags(self.config.rope)

    def _sizes(self, *, mtp: bool) -> dict[str, KeyValue]:
        c = self.config
        layers = {"block_count": c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)}
        return {
            **layers,
            "context_length": c.max_position_embeddings,
            "embedding_length": c.hidden_size,
            "feed_forward_length": c.intermediate_size,
            "attention.head_count": c.num_attention_heads,
            "attention.head_count_kv": c.num_key_value_heads,
            "attention.key_length": c.head_dim,
            "attention.value_length": c.head_dim,
            "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
            "rope.dimension_count": c.rotary_dim,
            "rope.freq_base": float(c.rope_theta),
            "vocab_size": c.vocab_size,
            **({"nextn_predict_layers": c.num_nextn_predict_layers} if mtp else {}),
        }

    def _experts(self) -> dict[str, KeyValue]:
        c = self.config
        if not c.n_routed_experts:
            return {}
        values: dict[str, KeyValue] = {
            "expert_count": c.n_routed_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.moe_intermediate_size,
            "expert_shared_count": c.n_shared_experts,
            "expert_shared_feed_forward_length": c.n_shared_experts * c.moe_intermediate_size,
            "expert_gating_func": GATING[c.scoring_func],
            "expert_weights_norm": c.norm_topk_prob,
            "expert_weights_scale": float(c.routed_scaling_factor),
        }
        values |= self.family.llama_cpp.keys
        if self.family.llama_cpp.leading_dense:
            values["leading_dense_block_count"] = len(c.dense_layers)
        if c.topk_group < c.n_group:
            values |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
        return values

    def _scaling(self) -> dict[str, KeyValue]:
        scaling = self.config.rope_scaling
        if isinstance(scaling, Linear):
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
        if not isinstance(scaling, Yarn):
            return {}  # Llama 3's is a tensor
        original = scaling.original_max_position_embeddings or self.config.max_position_embeddings
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": original,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }

    def _granted(self) -> frozenset[str]:
        """Keys that llama.cpp need not find, because its graph takes them for granted."""
        granted = {
            "scoring_func": "expert_gating_func",
            "norm_topk_prob": "expert_weights_norm",
            "routed_scaling_factor": "expert_weights_scale",
        }
        routing = self.family.llama_cpp.routing
        return frozenset(key for entry, key in granted.items() if entry in routing)

    def _default(self, key: str, found: Callable[[str], object]) -> object:
        """What llama.cpp takes for a missing key, None if it refuses the file."""

        def number(name: str) -> int:
            value = found(f"{self.architecture}.{name}")
            return value if isinstance(value, int) and not isinstance(value, bool) else 0

        heads = number("attention.head_count")
        match key:
            case "attention.head_count_kv":
                return heads
            case "attention.key_length" | "attention.value_length":
                return number("embedding_length") // heads if heads else 0
            case "rope.dimension_count":
                return number("attention.key_length") or self._default("attention.key_length", found)
            case "expert_shared_count":
                return number("expert_shared_feed_forward_length") // max(1, number("expert_feed_forward_length"))
            case "expert_shared_feed_forward_length":
                return number("expert_shared_count") * number("expert_feed_forward_length")
            case "expert_feed_forward_length":
                return number("feed_forward_length")
            case "rope.scaling.original_context_length":
                return number("context_length")
            case "expert_gating_func":
                return GATING["sigmoid" if self.config.selection_bias else "softmax"]
            case _:
                return _DEFAULTS.get(key)

    def _faults(self, *, mtp: bool) -> Iterator[str]:
        c, form = self.config, self.family.llama_cpp
        called = self.family.entries
        for entry, value in form.routing.items() if c.n_routed_experts else ():
            if getattr(c, entry) != value:
                found = f"{called.get(entry, entry)} is {getattr(c, entry)!r}"
                yield f"{found}, llama.cpp takes {value!r} for {form.architecture}"
        leading = frozenset(range(len(c.dense_layers)))
        if c.n_routed_experts and (c.dense_layers != leading if form.leading_dense else c.dense_layers):
            yield f"layers {sorted(c.dense_layers)} have no experts, which llama.cpp has no {form.architecture} for"
        if c.num_hidden_layers + c.num_nextn_predict_layers > MAX_LAYERS:
            yield f"num_hidden_layers {c.num_hidden_layers}: llama.cpp holds at most {MAX_LAYERS} with MTP"
        if c.n_routed_experts > MAX_EXPERTS:
            yield f"{c.n_routed_experts} experts: llama.cpp holds at most {MAX_EXPERTS}"
        if mtp and not form.mtp:
            yield f"llama.cpp has no place for an MTP layer of {form.architecture}"
        yield from self._rope_faults()

    def _rope_faults(self) -> Iterator[str]:
        c, form = self.config, self.family.llama_cpp
        scaling = c.rope_scaling
        if form.permuted and c.rotary_dim != c.head_dim:
            yield f"{c.rotary_dim} dimensions of a head of {c.head_dim} are rotated, llama.cpp rotates all of llama's"
        if isinstance(scaling, Llama3) and not form.permuted:
            yield f"rope_scaling is llama3, llama.cpp reads its factors for llama alone, not for {form.architecture}"
        if isinstance(scaling, Yarn):
            factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
            if not scaling.truncate:
                yield "rope_scaling.truncate is false, llama.cpp rounds the ramp of yarn to whole indices"
            if not math.isclose(c.rope.attention_factor, factor, rel_tol=1e-6) or c.rope.softmax_factor != 1:
                yield f"yarn scales by {c.rope.attention_factor:g}, llama.cpp by {factor:g}"


def _same(found: object, needed: KeyValue) -> bool:
    """Floats are stored as float32."""
    if isinstance(found, int | float) and isinstance(needed, float):
        return math.isclose(found, needed, rel_tol=1e-6, abs_tol=1e-30)
    return found == needed
