"""The family ``glm_moe_dsa``: GLM-5, 5.1 and 5.2. DeepSeek V3.2 in other sizes, its indexers' dimensions rotated in
other pairs; in 5.2 some layers attend to the keys that the indexer of a layer before them chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.arch.deepseek_v3_config import ONE_GROUP, DeepseekConfig
from quantkit.arch.deepseek_v32 import DeepseekV32

if TYPE_CHECKING:
    from quantkit.arch.deepseek_v3_gguf import Dialect


class GlmMoeDsa(DeepseekV32):
    """A `ModelArch`."""

    interleaved_index = True

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        return DeepseekV32._checked({**ONE_GROUP, **config})

    def _dialect(self) -> Dialect:
        from quantkit.arch.deepseek_v32_gguf import glm_dsa

        return glm_dsa(self.sparse)
