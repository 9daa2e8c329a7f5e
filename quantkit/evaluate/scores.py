"""Whether held-out scores keep a recipe's limits. Plain values, no torch."""

from __future__ import annotations

from quantkit.documents.conversion import ValidationScores


def limits_exceeded(
    scores: ValidationScores, *, max_perplexity_increase: float | None, max_mean_kl: float | None
) -> tuple[str, ...]:
    """One line for each limit that the scores exceed. A score that is no number keeps no limit."""
    problems: list[str] = []
    increase = scores.perplexity_ratio.mean - 1
    if max_perplexity_increase is not None and not increase <= max_perplexity_increase:
        problems.append(f"perplexity grew by {increase:.2%}, the recipe allows {max_perplexity_increase:.2%}")
    if max_mean_kl is not None and not scores.mean_kl.mean <= max_mean_kl:
        problems.append(f"mean KL divergence is {scores.mean_kl.mean:.5f}, the recipe allows {max_mean_kl:.5f}")
    return tuple(problems)
