"""What one family of `Gqa` says about itself: where its tensors sit, what its config.json calls things, and what it is
to llama.cpp. A row of `families.FAMILIES` each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from quantkit.arch.base import KeyValue, MlpNames
from quantkit.arch.gqa.config import GqaConfig
from quantkit.arch.rope import rope_entries
from quantkit.errors import ConfigError

MLP_NAMES = MlpNames(gate="gate_proj", up="up_proj", down="down_proj")


@dataclass(frozen=True, slots=True)
class MoeNames:
    """Where the experts of a layer are: ``block`` stands before all, inside the layer; ``router``, ``bias`` (of the
    selection), ``shared`` and ``experts`` are inside the block, ``expert`` are the linears of one.
    ``bias_row``: the bias is a matrix of one row."""

    block: str = "mlp."
    router: str = "gate.weight"
    bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_experts."
    experts: str = "experts."
    expert: MlpNames = MLP_NAMES
    bias_row: bool = False


@dataclass(frozen=True, slots=True)
class LlamaCppForm:
    """What a family is to llama.cpp.

    ``architecture``: its name there; ``mlp_norm``: tensor of post_attention_layernorm; ``permuted``: rows of q and k
    lie in pairs of neighbours. ``routing``: entries of the config that its graph takes for granted, whatever a file
    says. ``leading_dense``: the first layers may be dense; else all layers have experts, or none. ``mtp``: it has a
    place for the MTP layer. ``bias``: tensor of the selection bias. ``keys``: metadata that all its models have,
    without the architecture in front.
    """

    architecture: str
    mlp_norm: str = "ffn_norm.weight"
    permuted: bool = False
    routing: Mapping[str, object] = field(default_factory=dict[str, object])
    leading_dense: bool = False
    mtp: bool = False
    bias: str = "exp_probs_b.bias"
    keys: Mapping[str, KeyValue] = field(default_factory=dict[str, KeyValue])


Raw = Mapping[str, object]
"""A config.json."""


@dataclass(frozen=True, slots=True)
class GqaFamily:
    """``entries``: entry of `GqaConfig` -> its name in config.json, where that is another. ``unsaid``: entries that
    config.json may leave out. ``fixed``: entries that all models of the family have. ``only``: names in config.json ->
    the one value that is computed here, which may be missing. ``derived``: entries that a config.json says by several
    others. ``routed``: its models have experts. ``mtp_norm``: the last norm of an MTP layer."""

    llama_cpp: LlamaCppForm
    moe: MoeNames = field(default_factory=MoeNames)
    entries: Mapping[str, str] = field(default_factory=dict[str, str])
    unsaid: Raw = field(default_factory=dict[str, object])
    fixed: Raw = field(default_factory=dict[str, object])
    only: Raw = field(default_factory=dict[str, object])
    derived: Callable[[Raw], Raw] | None = None
    routed: bool = True
    mtp_norm: str = "shared_head.norm"

    def config_of(self, raw: Raw) -> GqaConfig:
        """What a config.json says, checked. Raises `ConfigError`."""
        for key, value in self.only.items():
            if raw.get(key, value) not in (value, None):
                raise ConfigError(f"config.json: {key} is {raw[key]!r:.60}, only {value!r} is computed.")
        found = {name: raw[key] for name, key in self._keys() if raw.get(key) is not None}
        derived = self.derived(raw) if self.derived is not None else {}
        entries = {**self.unsaid, **found, **_rope(raw), **derived, **self.fixed}
        return self.checked(_completed(entries, raw))

    def checked(self, entries: Raw) -> GqaConfig:
        """The same of entries by their own names. Raises `ConfigError`."""
        return GqaConfig.of(entries, self.entries)

    def _keys(self) -> Iterable[tuple[str, str]]:
        return ((name, self.entries.get(name, name)) for name in GqaConfig.model_fields)


def _rope(raw: Raw) -> dict[str, object]:
    """Base and scaling of the rotation, where config.json has them."""
    entries = rope_entries(raw)
    if isinstance(scaling := entries["rope_scaling"], Mapping):
        rest = cast("Raw", scaling).items()
        entries["rope_scaling"] = {key: value for key, value in rest if key != "partial_rotary_factor"}
    return entries


def _completed(entries: dict[str, object], raw: Raw) -> dict[str, object]:
    """With the sizes that follow from others."""
    hidden, heads = entries.get("hidden_size"), entries.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        entries.setdefault("head_dim", hidden // heads)
    entries.setdefault("num_key_value_heads", heads)
    head_dim, fraction = entries.get("head_dim"), _rotated_fraction(entries, raw)
    if isinstance(head_dim, int):
        entries.setdefault("rotary_dim", int(head_dim * fraction))
    return {key: value for key, value in entries.items() if key != "rotated"}


def _rotated_fraction(entries: Raw, raw: Raw) -> float:
    """Of a head's dimensions; transformers 5 writes it beside the base."""
    parameters = raw.get("rope_parameters")
    inner = cast("Raw", parameters).get("partial_rotary_factor") if isinstance(parameters, Mapping) else None
    for found in (raw.get("partial_rotary_factor"), inner, entries.get("rotated")):
        if isinstance(found, int | float) and 0 < found <= 1:
            return found
    return 1.0
