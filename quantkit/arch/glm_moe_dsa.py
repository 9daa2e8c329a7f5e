"""The family ``glm_moe_dsa``: GLM-5, 5.1 and 5.2. DeepSeek V3.2 in other sizes; in 5.2 some layers attend to the keys
that the indexer of a layer before them chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field

from quantkit.arch.deepseek_v3_config import DeepseekConfig
from quantkit.arch.deepseek_v32 import DeepseekV32
from quantkit.arch.deepseek_v32_config import ROUTING, DeepseekV32Config
from quantkit.arch.rope import LinearScaling

if TYPE_CHECKING:
    from quantkit.arch.deepseek_v3_gguf import Dialect

Kind = Literal["full", "shared"]


class GlmMoeDsaConfig(DeepseekV32Config):
    """DeepSeek V3.2's, with the kind of each layer's indexer."""

    indexer_types: tuple[Kind, ...] = ()
    index_topk_pattern: Annotated[str, Field(pattern="^F[FS]*$")] | None = None
    index_topk_freq: Annotated[int, Field(ge=1)] = 1
    index_skip_topk_offset: Annotated[int, Field(ge=0)] = 2

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
        unsaid: dict[str, object] = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1}
        kinds = config.get("indexer_types")
        listed = {"indexer_types": tuple(cast("list[object]", kinds) if isinstance(kinds, list) else ())}
        return GlmMoeDsaConfig.of({**ROUTING, **unsaid, **config, **listed})

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
