"""What a decoder of grouped-query attention computes with, whatever its config.json calls it: sizes and switches,
checked.

Entries have DeepSeek's names, where DeepSeek has them. `GqaFamily` says how a config.json becomes this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from quantkit.arch.config_entries import Count, Size, config_error, contradiction, whole
from quantkit.arch.rope import Linear, LinearScaling, Llama3, Rope, Yarn

if TYPE_CHECKING:
    from typing_extensions import Self


class GqaConfig(BaseModel):
    """``dense_layers``: those whose MLP is dense; all of them in a model without experts. ``selection_bias``: experts
    are chosen by scores with a bias."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    hidden_size: Size
    vocab_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=4096)]
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=64)] = 0
    intermediate_size: Size
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Size
    rotary_dim: Size
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "flat"] = "none"
    max_position_embeddings: Annotated[int, Field(gt=0)]
    rms_norm_eps: PositiveFloat
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    rope_scaling: Annotated[Yarn | Llama3 | Linear, Field(discriminator="type")] | None = None
    rope_interleave: bool = False
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"

    n_routed_experts: Annotated[int, Field(ge=0, le=2**16)] = 0
    num_experts_per_tok: Annotated[int, Field(ge=0, le=2**16)] = 0
    moe_intermediate_size: Annotated[int, Field(ge=0, le=2**24)] = 0
    n_shared_experts: Annotated[int, Field(ge=0, le=2**16)] = 0
    dense_layers: frozenset[int] = frozenset()
    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    selection_bias: bool = False
    n_group: Count = 1
    topk_group: Count = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveFloat = 1.0

    @classmethod
    def of(cls, entries: Mapping[str, object], called: Mapping[str, str]) -> Self:
        """The checked entries; `ConfigError` with every fault in one line. ``called``: entry -> its name in
        config.json, where that is another."""
        try:
            return cls.model_validate(whole(entries))
        except ValidationError as error:
            raise config_error(error, called=called) from None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise contradiction(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise contradiction(f"{self.rotary_dim} dimensions of a head of {self.head_dim} cannot be rotated in pairs")
        if self.n_routed_experts:
            self._agree_on_experts()
        return self

    def _agree_on_experts(self) -> None:
        group_size, rest = divmod(self.n_routed_experts, self.n_group)
        if rest or self.topk_group > self.n_group or (self.topk_group < self.n_group and group_size < 2):
            raise contradiction(
                f"{self.n_routed_experts} experts in n_group {self.n_group} groups, topk_group {self.topk_group}: "
                "groups are of one size, two experts and more, and as many as are taken"
            )
        if not 0 < self.num_experts_per_tok <= self.topk_group * group_size:
            raise contradiction(
                f"num_experts_per_tok is {self.num_experts_per_tok}, 1 to {self.topk_group * group_size} was needed"
            )
        if not self.moe_intermediate_size:
            raise contradiction("moe_intermediate_size is missing")

    @property
    def rope(self) -> Rope:
        """The rotary embedding of the first ``rotary_dim`` dimensions of each head."""
        scaling = self.rope_scaling
        return Rope(
            dim=self.rotary_dim,
            theta=self.rope_theta,
            interleaved=self.rope_interleave,
            max_positions=self.max_position_embeddings,
            yarn=scaling if isinstance(scaling, Yarn) else None,
            linear=LinearScaling(scaling.factor) if isinstance(scaling, Linear) else None,
            llama3=scaling if isinstance(scaling, Llama3) else None,
        )

    def is_dense(self, layer: int) -> bool:
        """Whether a decoder layer has no experts. MTP layers have them if the model has."""
        return not self.n_routed_experts or layer in self.dense_layers
