"""config.json of DeepSeek's families with latent attention, checked: sizes, switches, and what contradicts what.

`DeepseekConfig` is what they share; each family has its own ways to choose experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from quantkit.arch.config_entries import Count, Size, config_error, contradiction, whole
from quantkit.arch.rope import Rope, Yarn, rope_entries
from quantkit.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

LATENT_NORM_EPS = 1e-6
"""Epsilon of q_a_layernorm and kv_a_layernorm, whatever ``rms_norm_eps`` says, in the official code and in
transformers."""


SIGMOID_ROUTING: Mapping[str, object] = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""How DeepSeek V3 routes, for families whose config.json does not say it."""
ONE_GROUP: Mapping[str, object] = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1}


class DeepseekConfig(BaseModel):
    """What config.json says about tensors and arithmetic, by the official names. Other entries are ignored."""

    routing_hint: ClassVar[str] = ""
    """What to do about a config.json whose ``scoring_func`` or ``topk_method`` is missing or another family's."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    hidden_size: Size
    vocab_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=4096)]
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=64)] = 0
    intermediate_size: Size
    moe_intermediate_size: Size
    n_routed_experts: Count
    n_shared_experts: Count
    num_experts_per_tok: Count
    n_group: Count
    topk_group: Count
    first_k_dense_replace: Annotated[int, Field(ge=0)]
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    max_position_embeddings: Annotated[int, Field(gt=0)]
    rms_norm_eps: PositiveFloat
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    rope_scaling: Yarn | None = None
    rope_interleave: bool = True
    norm_topk_prob: bool
    routed_scaling_factor: PositiveFloat
    tie_word_embeddings: bool = False
    scoring_func: Literal["sigmoid", "softmax"]
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"]
    moe_layer_freq: Literal[1] = 1
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Self:
        """The checked entries of a raw config.json; `ConfigError` with every fault in one line."""
        try:
            return cls.model_validate(whole({**config, **rope_entries(config), **_dense_layers(config)}))
        except ValidationError as error:
            raise config_error(error, cls.routing_hint) from None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        group_size, rest = divmod(self.n_routed_experts, self.n_group)
        if rest:
            raise contradiction(f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}")
        if self.topk_group > self.n_group:
            raise contradiction(f"topk_group {self.topk_group} is larger than n_group {self.n_group}")
        if group_size < 2 and self.topk_method == "noaux_tc":
            raise contradiction(
                f"n_group {self.n_group} leaves one expert per group, groups are ranked by their best two"
            )
        if self.num_experts_per_tok > self.topk_group * group_size:
            raise contradiction(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {self.topk_group * group_size} "
                "experts in topk_group groups"
            )
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise contradiction(
                f"num_key_value_heads {self.num_key_value_heads} is not num_attention_heads {self.num_attention_heads}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise contradiction(
                f"first_k_dense_replace {self.first_k_dense_replace} is more than "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        if self.qk_rope_head_dim % 2:
            raise contradiction(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd, rotation needs pairs")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope(self) -> Rope:
        """The rotary embedding of the last ``qk_rope_head_dim`` dimensions of each head."""
        return Rope(
            dim=self.qk_rope_head_dim,
            theta=self.rope_theta,
            interleaved=self.rope_interleave,
            max_positions=self.max_position_embeddings,
            yarn=self.rope_scaling,
        )


class DeepseekV3Config(DeepseekConfig):
    """Experts are chosen by biased sigmoids (arXiv 2412.19437, section 2.1.2)."""

    routing_hint = (
        'deepseek_v3 routes with scoring_func "sigmoid" and topk_method "noaux_tc". transformers 5 drops both keys '
        "when it saves a config.json: take the official file, or add them by hand."
    )

    scoring_func: Literal["sigmoid"]  # pyright: ignore[reportIncompatibleVariableOverride]
    topk_method: Literal["noaux_tc"]  # pyright: ignore[reportIncompatibleVariableOverride]


def _dense_layers(config: Mapping[str, object]) -> dict[str, object]:
    """``first_k_dense_replace`` where a config lists the kind of each MLP instead, as transformers 5 writes it."""
    kinds = config.get("mlp_layer_types")
    if not isinstance(kinds, list) or "first_k_dense_replace" in config:
        return {}
    kinds = cast("list[object]", kinds)
    dense = next((number for number, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if any(kind != "sparse" for kind in kinds[dense:]):
        raise ConfigError("config.json: mlp_layer_types has a layer that is not sparse after the first sparse one.")
    return {"first_k_dense_replace": dense}
