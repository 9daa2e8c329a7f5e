"""Token scores -> means with errors over windows; limits of a recipe."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quantkit.documents.conversion import ValidationScores
from quantkit.documents.values import Mean
from quantkit.evaluate.scores import limits_exceeded
from quantkit.evaluate.token_scores import TokenScores
from quantkit.evaluate.validation import summarise


@pytest.fixture
def tokens() -> TokenScores:
    random = torch.Generator().manual_seed(0)
    reference = 2 + torch.rand(6, 50, generator=random, dtype=torch.float64)
    kld = torch.rand(6, 50, generator=random, dtype=torch.float64)
    return TokenScores(reference, reference + 0.1 * kld, kld, kld < 0.5)


def test_means_and_errors_are_those_of_windows(tokens: TokenScores) -> None:
    scores = summarise(tokens)
    assert (scores.windows, scores.tokens) == (6, 300)
    windows = tokens.candidate_nll.mean(1)
    perplexity = math.exp(windows.mean())
    assert scores.candidate_perplexity.mean == pytest.approx(perplexity)
    assert scores.candidate_perplexity.standard_error == pytest.approx(perplexity * float(windows.std()) / math.sqrt(6))
    assert scores.mean_kl.mean == pytest.approx(float(tokens.kld.mean()))
    assert scores.mean_kl.standard_error == pytest.approx(float(tokens.kld.mean(1).std()) / math.sqrt(6))
    assert scores.top1.mean == pytest.approx(float((tokens.kld < 0.5).double().mean()))
    ordered = tokens.kld.flatten().sort().values
    assert ordered[148] <= scores.median_kl <= ordered[150]
    assert scores.p99_kl == pytest.approx(float(ordered[297]))


def test_losses_beyond_all_measure_are_an_infinite_perplexity(tokens: TokenScores) -> None:
    scores = summarise(replace(tokens, candidate_nll=tokens.candidate_nll + 1e4))
    assert (scores.candidate_perplexity.mean, scores.perplexity_ratio.mean) == (math.inf, math.inf)
    assert math.isnan(summarise(replace(tokens, candidate_nll=tokens.candidate_nll * math.nan)).perplexity_ratio.mean)


def test_the_ratio_is_paired(tokens: TokenScores) -> None:
    """What both find hard cancels: its error is far below that of either perplexity."""
    hard = torch.linspace(0, 3, 6, dtype=torch.float64)[:, None]
    scores = summarise(replace_losses(tokens, hard))
    assert scores.perplexity_ratio.mean == pytest.approx(summarise(tokens).perplexity_ratio.mean)
    assert scores.perplexity_ratio.standard_error < scores.reference_perplexity.standard_error / 100


def replace_losses(tokens: TokenScores, added: torch.Tensor) -> TokenScores:
    return replace(tokens, reference_nll=tokens.reference_nll + added, candidate_nll=tokens.candidate_nll + added)


def test_one_window_has_no_error(tokens: TokenScores) -> None:
    one = TokenScores(tokens.reference_nll[:1], tokens.candidate_nll[:1], tokens.kld[:1], tokens.same_top[:1])
    assert math.isnan(summarise(one).mean_kl.standard_error)


def scores_of(ratio: float, kl: float) -> ValidationScores:
    zero = Mean(mean=0, standard_error=0)
    return ValidationScores(
        windows=1,
        tokens=1,
        reference_perplexity=zero,
        candidate_perplexity=zero,
        perplexity_ratio=Mean(mean=ratio, standard_error=0),
        mean_kl=Mean(mean=kl, standard_error=0),
        median_kl=0,
        p99_kl=0,
        top1=zero,
    )


@pytest.mark.parametrize(
    ("ratio", "kl", "problems"),
    [
        (1.02, 0.05, 0),  # exactly at the limits
        (0.9, 0.0, 0),
        (1.0201, 0.01, 1),
        (1.0, 0.0501, 1),
        (2.0, 1.0, 2),
        (math.nan, math.nan, 2),
        (math.inf, 0.0, 1),
    ],
)
def test_limits(ratio: float, kl: float, problems: int) -> None:
    found = limits_exceeded(scores_of(ratio, kl), max_perplexity_increase=0.02 + 1e-12, max_mean_kl=0.05)
    assert len(found) == problems
    assert all("the recipe allows" in line and "\n" not in line for line in found)
    assert not limits_exceeded(scores_of(ratio, kl), max_perplexity_increase=None, max_mean_kl=None)
