"""Whether a model is made for sequences of a length."""

from __future__ import annotations

from quantkit.arch.base import ModelArch
from quantkit.errors import PlanError
from quantkit.plan.recipe import Recipe


def check_length(name: str, length: int, arch: ModelArch) -> None:
    """Raise `PlanError` if ``length`` tokens, of the option ``name``, are more than the model has positions for:
    beyond them it computes what no runtime serves."""
    most = arch.serving().max_positions
    if length > most:
        raise PlanError(f"{name} {length:,}: {_made_for(most)}.", hint=f"Give {most} or less.")


def length_notes(recipe: Recipe, arch: ModelArch) -> list[str]:
    """A line for each text of a recipe whose sequences are longer than that."""
    calibration, validation, most = recipe.calibration, recipe.validation, arch.serving().max_positions
    lengths = {
        "calibration: sequence_length": 0 if calibration is None else calibration.sequence_length,
        "validation: context": 0 if validation is None else validation.context,
    }
    return [f"{name} {length:,}: {_made_for(most)}." for name, length in lengths.items() if length > most]


def _made_for(most: int) -> str:
    return f"the model is made for at most {most:,} tokens (max_position_embeddings)"
