"""Where tensors sit in a model and how a layer computes: one file for each family, one row for each model
that is DeepSeek V3 under another name, or of grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from quantkit.arch.base import ArchFactory, ModelArch
from quantkit.arch.deepseek_v2 import DeepseekV2
from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_variants import VARIANTS
from quantkit.arch.deepseek_v32 import DeepseekV32
from quantkit.arch.glm_moe_dsa import GlmMoeDsa
from quantkit.arch.gqa import families as gqa
from quantkit.arch.unknown import NOT_COMPUTED
from quantkit.errors import ConfigError

INSPECT = "`quantkit inspect` shows what a checkpoint of any architecture holds."

ARCHS: dict[str, ArchFactory] = {
    "DeepseekV2ForCausalLM": DeepseekV2,
    "DeepseekV3ForCausalLM": DeepseekV3,
    "DeepseekV32ForCausalLM": DeepseekV32,
    "GlmMoeDsaForCausalLM": GlmMoeDsa,
    **VARIANTS,
    **gqa.FACTORIES,
}


def arch_of(config: Mapping[str, object]) -> ModelArch:
    """The family of a raw config.json, bound to it. `ConfigError`: unknown architecture, or values that contradict."""
    named = config.get("architectures")
    names = cast("list[object]", named) if isinstance(named, list) else [named]
    for name in names:
        if isinstance(name, str) and name in ARCHS:
            return ARCHS[name](config)
    found = repr(named)[:80] if named is not None else "missing"
    known = f"quantkit knows {', '.join(sorted(ARCHS))}"
    near = next((name for name in names if isinstance(name, str) and name in NOT_COMPUTED), None)
    if near is None:
        raise ConfigError(f"config.json: architectures is {found}; {known}.", hint=INSPECT)
    raise ConfigError(
        f"config.json: architectures is {found}: the model has {NOT_COMPUTED[near]}, which quantkit does not compute.",
        hint=f"{INSPECT} {known[0].upper()}{known[1:]}.",
    )
