"""Whether a model is made for sequences of a length."""

from __future__ import annotations

from quantkit.arch.base import ModelArch
from quantkit.errors import PlanError
from quantkit.plan.recipe import Recipe


def check_length(name: str, length: int, arch: ModelArch) -> None:
    """Raise `PlanError` if ``length`` tokens, of the option or key ``name``, are more than the model has positions
    for: beyond them it computes what no runtime serves."""
    most = arch.serving().max_positions
    if length > most:
        raise PlanError(
            f"{name} {length:,}: the model is made for at most {most:,} tokens (max_position_embeddings).",
            hint=f"Give {most} or less.",
        )


def check_lengths(recipe: Recipe, arch: ModelArch) -> None:
    """`check_length` of a recipe's texts."""
    if recipe.calibration is not None:
        check_length("calibration: sequence_length", recipe.calibration.sequence_length, arch)
    if recipe.validation is not None:
        check_length("validation: context", recipe.validation.context, arch)
