"""The family ``glm_moe_dsa``: GLM-5, 5.1 and 5.2. DeepSeek V3.2 in other sizes; in 5.2 some layers attend to the keys
that the indexer of a layer before them chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field, model_validator

from quantkit.arch.deepseek_v3_config import ONE_GROUP, SIGMOID_ROUTING, DeepseekConfig, contradiction
from quantkit.arch.deepseek_v32 import DeepseekV32
from quantkit.arch.deepseek_v32_config import DeepseekV32Config
from quantkit.arch.rope import LinearScaling

if TYPE_CHECKING:
    from typing_extensions import Self

    from quantkit.arch.deepseek_v3_gguf import Dialect

Kind = Literal["full", "shared"]


class GlmMoeDsaConfig(DeepseekV32Config):
    """DeepSeek V3.2's, with the kind of each layer's indexer."""

    indexer_types: tuple[Kind, ...] = ()
    index_topk_pattern: Annotated[str, Field(pattern="^F[FS]*$")] | None = None
    index_topk_freq: Annotated[int, Field(ge=1)] = 1
    index_skip_topk_offset: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _says_each_layer(self) -> Self:
        for key, listed in (("indexer_types", self.indexer_types), ("index_topk_pattern", self.index_topk_pattern)):
            if listed and len(listed) < self.num_hidden_layers:
                raise contradiction(f"{key} has {len(listed)} entries, num_hidden_layers is {self.num_hidden_layers}")
        return self

    def kind(self, layer: int) -> Kind:
        """Of a layer's indexer: one of its own, or that of the last full layer."""
        if layer >= self.num_hidden_layers:
            return "full"
        if self.indexer_types:
            return self.indexer_types[layer]
        if self.index_topk_pattern is not None:
            return "full" if self.index_topk_pattern[layer] == "F" else "shared"
        since = max(layer - self.index_skip_topk_offset + 1, 0)
        return "full" if since % self.index_topk_freq == 0 else "shared"


class GlmMoeDsa(DeepseekV32):
    """A `ModelArch`."""

    interleaved_index = True

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        kinds = config.get("indexer_types")
        listed = {"indexer_types": tuple(cast("list[object]", kinds) if isinstance(kinds, list) else ())}
        return GlmMoeDsaConfig.of({**SIGMOID_ROUTING, **ONE_GROUP, **config, **listed})

    def _bind(self, config: DeepseekConfig, scaling: LinearScaling | None = None) -> None:
        super()._bind(config, scaling)
        shared = not all(self.has_indexer(layer) for layer in range(self.n_layers))
        self.longest_exact: int | None = self.sparse.index_topk if shared else None

    def _dialect(self) -> Dialect:
        from quantkit.arch.deepseek_v32_gguf import glm_dsa

        return glm_dsa(self.sparse, tuple(self.has_indexer(layer) for layer in range(self.n_layers)))

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer has an indexer of its own."""
        assert isinstance(self.config, GlmMoeDsaConfig)
        return self.config.kind(layer) == "full"
