"""Held-out scores of a candidate against its reference, and whether they keep a recipe's limits. Plain values, no
torch."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.documents.evaluation import estimate, percent


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error over windows."""

    mean: float
    standard_error: float

    def shown(self, digits: int) -> str:
        """ "1.2345 ± 0.0067"; "-" for the error of a single window."""
        return estimate(self.mean, self.standard_error, digits)

    def percent(self) -> str:
        """ "12.34% ± 0.56%"."""
        return percent(self.mean, self.standard_error)


@dataclass(frozen=True, slots=True)
class Scores:
    """Reference against candidate on held-out windows. Perplexities are exp of the mean loss over all tokens, their
    errors by the delta method over windows; KLD in nats per token; ``perplexity_ratio`` is paired, so its error leaves
    out what both find hard."""

    windows: int
    tokens: int
    reference_perplexity: Estimate
    candidate_perplexity: Estimate
    perplexity_ratio: Estimate
    mean_kl: Estimate
    median_kl: float
    p99_kl: float
    top1: Estimate


def limits_exceeded(
    scores: Scores, *, max_perplexity_increase: float | None, max_mean_kl: float | None
) -> tuple[str, ...]:
    """One line for each limit that the scores exceed. A score that is no number keeps no limit."""
    problems: list[str] = []
    increase = scores.perplexity_ratio.mean - 1
    if max_perplexity_increase is not None and not increase <= max_perplexity_increase:
        problems.append(f"perplexity grew by {increase:.2%}, the recipe allows {max_perplexity_increase:.2%}")
    if max_mean_kl is not None and not scores.mean_kl.mean <= max_mean_kl:
        problems.append(f"mean KL divergence is {scores.mean_kl.mean:.5f}, the recipe allows {max_mean_kl:.5f}")
    return tuple(problems)
