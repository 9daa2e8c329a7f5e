"""config.json of the families with DeepSeek V3.2's indexers, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field, field_validator, model_validator

from quantkit.arch.deepseek_v3_config import Count, DeepseekV3Config, Size, contradiction

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["full", "shared"]


class DeepseekV32Config(DeepseekV3Config):
    """DeepSeek V3's, with the sizes of the indexer, and which layers have one: all, unless GLM-5.2's entries say
    otherwise."""

    q_lora_rank: Size  # pyright: ignore[reportIncompatibleVariableOverride]
    index_n_heads: Count
    index_head_dim: Size
    index_topk: Size
    indexer_types: tuple[Kind, ...] = ()
    index_topk_pattern: Annotated[str, Field(pattern="^F[FS]*$")] | None = None
    index_topk_freq: Annotated[int, Field(ge=1)] = 1
    index_skip_topk_offset: Annotated[int, Field(ge=0)] = 2

    @field_validator("indexer_types", mode="before")
    @classmethod
    def _listed(cls, kinds: object) -> object:
        return tuple(cast("list[object]", kinds)) if isinstance(kinds, list) else kinds or ()

    @model_validator(mode="after")
    def _says_each_layer(self) -> Self:
        for key, listed in (("indexer_types", self.indexer_types), ("index_topk_pattern", self.index_topk_pattern)):
            if listed and len(listed) < self.num_hidden_layers:
                raise contradiction(f"{key} has {len(listed)} entries, num_hidden_layers is {self.num_hidden_layers}")
        return self

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer has an indexer of its own; else it attends to what that of an earlier layer chose."""
        if layer >= self.num_hidden_layers:
            return True
        if self.indexer_types:
            return self.indexer_types[layer] == "full"
        if self.index_topk_pattern is not None:
            return self.index_topk_pattern[layer] == "F"
        since = max(layer - self.index_skip_topk_offset + 1, 0)
        return since % self.index_topk_freq == 0
