"""The family ``glm4_moe_lite``: GLM-4.7-Flash. DeepSeek V3 in other sizes; its config.json names no way of routing, and
may list the kind of each MLP."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_config import DeepseekConfig, DeepseekV3Config


class Glm4MoeLite(DeepseekV3):
    """A `ModelArch`."""

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        unsaid = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
        return DeepseekV3Config.of({**unsaid, "n_group": 1, "topk_group": 1, **config})
