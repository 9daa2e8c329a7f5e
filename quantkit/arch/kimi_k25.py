"""The family ``kimi_k25``: Kimi K2.5, K2.6 and K2.7-Code. The language model is DeepSeek V3 under another prefix (Kimi
K2's config.json says ``DeepseekV3ForCausalLM`` itself); vision tower and projector are carried as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from quantkit.arch.base import CheckpointVariants
from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_config import SIGMOID_ROUTING, DeepseekConfig, DeepseekV3Config
from quantkit.errors import ConfigError


class KimiK25(DeepseekV3):
    """A `ModelArch`."""

    root = "language_model."

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError("config.json: text_config is missing, needed the config of the language model.")
        return DeepseekV3Config.of({**SIGMOID_ROUTING, **cast("Mapping[str, object]", text)})

    def variants(self) -> CheckpointVariants:
        """DeepSeek V3's, and the tensors of the vision tower and its projector."""
        return replace(super().variants(), carried=("vision_tower.*", "mm_projector.*"))
