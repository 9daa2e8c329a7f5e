"""What a reader should know about the calibration text of a plan, from its size alone."""

from __future__ import annotations

from quantkit.arch.base import ModelArch
from quantkit.plan.recipe import Recipe

MANY_EXPERTS = 64
"""Routed experts of a layer beyond which the text that comes with quantkit is small."""
TOKENS_OF_MANY_EXPERTS = 524288
"""Calibration tokens that such a model should have at least."""


def routed_experts(arch: ModelArch) -> int:
    """Routed experts of a layer, 0 for a dense model."""
    return 1 + max((spec.expert for spec in arch.tensors() if spec.expert is not None), default=-1)


def text_notes(recipe: Recipe, arch: ModelArch) -> list[str]:
    """One line if only built-in text calibrates a model of many experts."""
    calibration = recipe.calibration
    if calibration is None or not all(name.startswith("builtin:") for name in calibration.data):
        return []
    experts = routed_experts(arch)
    if experts <= MANY_EXPERTS:
        return []
    each = calibration.tokens * arch.serving().top_k // experts
    return [
        f"{', '.join(calibration.data)} is small for {experts} experts a layer: {calibration.tokens:,} tokens are "
        f"about {each:,} an expert. Calibrate with {TOKENS_OF_MANY_EXPERTS:,} tokens or more of the text that the "
        "model is for."
    ]
