"""The family ``glm4_moe_lite``: GLM-4.7-Flash. DeepSeek V3 in other sizes; its config.json names no way of routing, and
may list the kind of each MLP."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_config import ONE_GROUP, SIGMOID_ROUTING, DeepseekConfig, DeepseekV3Config


class Glm4MoeLite(DeepseekV3):
    """A `ModelArch`."""

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        return DeepseekV3Config.of({**SIGMOID_ROUTING, **ONE_GROUP, **config})
