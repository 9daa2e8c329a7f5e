"""Whether a model is made for sequences of a length, and whether they are computed as the model computes them."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.arch.base import ModelArch
from quantkit.errors import PlanError
from quantkit.plan.recipe import Recipe


def check_length(name: str, length: int, arch: ModelArch) -> None:
    """Raise `PlanError` if ``length`` tokens, of the option ``name``, are more than the model has positions for:
    beyond them it computes what no runtime serves. Also if they are more than quantkit computes exactly."""
    most = arch.serving().max_positions
    if length > most:
        raise PlanError(f"{name} {length:,}: {_made_for(most)}.", hint=f"Give {most} or less.")
    if arch.longest_exact is not None and length > arch.longest_exact:
        raise PlanError(
            f"{name} {length:,}: {_exact_to(arch.longest_exact)}", hint=f"Give {arch.longest_exact} or less."
        )


def length_problems(recipe: Recipe, arch: ModelArch) -> list[str]:
    """A line for each text of a recipe whose sequences cannot be computed as the model computes them."""
    exact = arch.longest_exact
    if exact is None:
        return []
    return [f"{name} {length:,}: {_exact_to(exact)}" for name, length in _lengths(recipe) if length > exact]


def length_notes(recipe: Recipe, arch: ModelArch) -> list[str]:
    """A line for each text of a recipe whose sequences are longer than the model is made for, and for those that are
    so short that its indexers choose every key."""
    sizes = arch.serving()
    notes: list[str] = []
    for name, length in _lengths(recipe):
        if length > sizes.max_positions:
            notes.append(f"{name} {length:,}: {_made_for(sizes.max_positions)}.")
        elif sizes.sparse_top_k is not None and length <= sizes.sparse_top_k:
            notes.append(
                f"{name} {length:,}: attention is dense up to {sizes.sparse_top_k:,} tokens (index_topk), what the "
                "indexers choose beyond them is not seen."
            )
    return notes


def _lengths(recipe: Recipe) -> Iterator[tuple[str, int]]:
    if recipe.calibration is not None:
        yield "calibration: sequence_length", recipe.calibration.sequence_length
    if recipe.validation is not None:
        yield "validation: context", recipe.validation.context


def _made_for(most: int) -> str:
    return f"the model is made for at most {most:,} tokens (max_position_embeddings)"


def _exact_to(most: int) -> str:
    return (
        f"some layers of this model attend to the keys that an earlier layer chose, which is computed exactly up to "
        f"{most:,} tokens only (index_topk)."
    )
