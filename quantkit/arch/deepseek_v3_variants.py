"""Models that are DeepSeek V3 but for names and for what config.json leaves unsaid: a row each.

A model belongs here if its layer computes exactly what `DeepseekV3` does. One whose arithmetic differs, however little,
is a family of its own, or is named in `unknown`. Sources: transformers 5.23 (GLM-4.7-Flash, Kimi K2.5); vLLM 0.33 and
llama.cpp's conversion/deepseek.py, which run the language model of Kimi-VL as DeepSeek's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_config import ONE_GROUP, SIGMOID_ROUTING
from quantkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Variant:
    """An `ArchFactory`.

    ``inside``: entry of config.json that has the language model's config, "" if it is the whole. ``root``: what stands
    before every name. ``unsaid``: entries of its config that it may leave out. ``carried``: as of `CheckpointVariants`.
    """

    inside: str = ""
    root: str = ""
    unsaid: Mapping[str, object] = field(default_factory=dict[str, object])
    carried: tuple[str, ...] = ()

    def __call__(self, config: Mapping[str, object]) -> DeepseekV3:
        """The model of a raw config.json. Raises `ConfigError`."""
        text = config.get(self.inside) if self.inside else config
        if not isinstance(text, Mapping):
            raise ConfigError(f"config.json: {self.inside} is missing, needed the config of the language model.")
        known = {**self.unsaid, **cast("Mapping[str, object]", text)}
        return DeepseekV3(known, root=self.root, carried=self.carried)


VARIANTS: Mapping[str, Variant] = {
    "Glm4MoeLiteForCausalLM": Variant(unsaid={**SIGMOID_ROUTING, **ONE_GROUP}),
    "KimiK25ForConditionalGeneration": Variant(
        inside="text_config",
        root="language_model.",
        unsaid=SIGMOID_ROUTING,
        carried=("vision_tower.*", "mm_projector.*"),
    ),
    "KimiVLForConditionalGeneration": Variant(
        inside="text_config",
        root="language_model.",
        carried=("vision_tower.*", "multi_modal_projector.*"),
    ),
}
"""Name in ``architectures`` -> how its checkpoints differ from DeepSeek V3's."""
