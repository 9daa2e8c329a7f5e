"""What a reader should know about the calibration text of a plan, from its size alone."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.arch.base import ModelArch
from quantkit.plan.recipe import Output, Recipe
from quantkit.tensors import Role

MANY_EXPERTS = 64
"""Routed experts of a layer beyond which the text that comes with quantkit is small."""
TOKENS_OF_MANY_EXPERTS = 524288
"""Calibration tokens that such a model should have at least."""


TOKENS_TO_TUNE = 32768
"""Calibration tokens from which tuning of layers is worth its time."""


def routed_experts(arch: ModelArch) -> int:
    """Routed experts of a layer, 0 for a dense model."""
    return 1 + max((spec.expert for spec in arch.tensors() if spec.expert is not None), default=-1)


@dataclass(frozen=True, slots=True)
class TokensPerExpert:
    """How the ``tokens`` of a calibration spread over the routed ``experts`` of a layer if the router had no
    favourites: each token takes ``top_k`` of them. ``width``: inputs of an expert's gate and up projections."""

    tokens: int
    experts: int
    top_k: int
    width: int

    @property
    def mean(self) -> int:
        """Tokens of an expert."""
        return self.tokens * self.top_k // self.experts

    @property
    def needed(self) -> int:
        """Calibration tokens from which ``mean`` reaches ``width``: the Hessian of fewer tokens is singular."""
        return -(-self.width * self.experts // self.top_k)


def expert_tokens(recipe: Recipe, arch: ModelArch) -> TokensPerExpert | None:
    """None without calibration text or without routed experts."""
    experts = routed_experts(arch)
    if recipe.calibration is None or not experts:
        return None
    width = next(spec.shape[-1] for spec in arch.tensors() if spec.role is Role.EXPERT)
    return TokensPerExpert(recipe.calibration.tokens, experts, arch.serving().top_k, width)


def text_notes(recipe: Recipe, arch: ModelArch) -> list[str]:
    """A line for each text that both calibrates and validates, one if only built-in text calibrates a model of many
    experts, and one if experts get too few tokens."""
    spread = expert_tokens(recipe, arch)
    of_experts = [] if spread is None else [*_builtin_notes(recipe, spread), *_rank_notes(recipe, spread)]
    return [*_same_text_notes(recipe), *_tuning_notes(recipe), *of_experts]


def _same_text_notes(recipe: Recipe) -> list[str]:
    if recipe.calibration is None or recipe.validation is None:
        return []
    both = [name for name in recipe.calibration.data if name in recipe.validation.text]
    return [f"{name} calibrates and validates: what is measured on it flatters the result." for name in both]


def _tuning_notes(recipe: Recipe) -> list[str]:
    if recipe.tune is None or recipe.calibration is None or recipe.calibration.tokens >= TOKENS_TO_TUNE:
        return []
    return [
        f"tune with {recipe.calibration.tokens:,} calibration tokens, of which a tenth only decides: from few tokens a "
        f"layer learns them by heart, and more of its tuning is discarded. Take {TOKENS_TO_TUNE:,} or more."
    ]


def _builtin_notes(recipe: Recipe, spread: TokensPerExpert) -> list[str]:
    data = () if recipe.calibration is None else recipe.calibration.data
    if spread.experts <= MANY_EXPERTS or not all(name.startswith("builtin:") for name in data):
        return []
    return [
        f"{', '.join(data)} is small for {spread.experts} experts a layer: {spread.tokens:,} tokens are about "
        f"{spread.mean:,} an expert. Calibrate with {TOKENS_OF_MANY_EXPERTS:,} tokens or more of the text that the "
        "model is for: `quantkit calibration build` makes such a set of your files."
    ]


def _rank_notes(recipe: Recipe, spread: TokensPerExpert) -> list[str]:
    if spread.mean >= spread.width or not any(map(_may_use_gptq, recipe.outputs)):
        return []
    return [
        f"an expert gets {spread.mean:,} calibration tokens on average, its gate and up projections have "
        f"{spread.width:,} inputs: a Hessian of fewer tokens than inputs is singular, and GPTQ leans on the pooled one "
        f"of the layer. From {spread.needed:,} tokens on, the average expert has enough of its own."
    ]


def _may_use_gptq(output: Output) -> bool:
    """Whether some rule's method, or the output's, needs inputs; null is gptq where there is text."""
    if output.method is None or output.method.needs_inputs:
        return True
    return any(rule.method is not None and rule.method.needs_inputs for rule in output.rules)
