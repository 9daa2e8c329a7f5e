"""Scores of tokens -> the numbers of evaluation.json. Means are over tokens, standard errors over windows: tokens of
one window are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.documents.evaluation import HISTOGRAM_EDGES, Divergence, Layer, Result, Scores, Windows
from quantkit.documents.values import DraftAgreement, Mean
from quantkit.evaluate.compare import Comparison
from quantkit.evaluate.drafts import DraftScores
from quantkit.evaluate.token_scores import TokenScores


def result_of(comparison: Comparison, domains: Sequence[str]) -> Result:
    """``domains``: of each window."""
    tokens = comparison.tokens
    rows: dict[str, list[int]] = {}
    for row, domain in enumerate(domains):
        rows.setdefault(domain, []).append(row)
    return Result(
        overall=scores_of(tokens),
        domains={domain: scores_of(tokens.rows(own)) for domain, own in rows.items()},
        layers=tuple(
            Layer(
                layer=found.layer,
                hidden_error=found.hidden_error,
                router_agreement=found.router_agreement,
                expert_tokens=found.expert_tokens,
                expert_errors=None if found.expert_errors is None else _rounded(found.expert_errors),
            )
            for found in comparison.layers
        ),
        windows=Windows(
            loss=_rounded(tokens.candidate_nll.mean(1).tolist()),
            kld=_rounded(tokens.kld.mean(1).tolist()),
            same_top=_rounded(tokens.same_top.double().mean(1).tolist()),
            layers=tuple(_rounded(found.window_errors) for found in comparison.layers),
        ),
        draft=drafts_of(comparison.drafts),
    )


def drafts_of(drafts: DraftScores | None) -> DraftAgreement | None:
    """Shares of positions with their standard errors, None without an MTP layer."""
    if drafts is None:
        return None
    reference = None if drafts.reference is None else _mean(drafts.reference.double())
    return DraftAgreement(reference=reference, candidate=_mean(drafts.candidate.double()))


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.7g}") for value in values)


def scores_of(tokens: TokenScores) -> Scores:
    """Scores over all windows of ``tokens``."""
    reference, candidate = tokens.reference_nll, tokens.candidate_nll
    change = ((-candidate).exp() - (-reference).exp()).square()
    return Scores(
        windows=len(reference),
        tokens=reference.numel(),
        reference_perplexity=_exp(_mean(reference)),
        perplexity=_exp(_mean(candidate)),
        log_ratio=_mean(candidate - reference),
        kld=_divergence(tokens.kld),
        same_top=_mean(tokens.same_top.double()),
        rms_probability_change=_root(_mean(change)),
    )


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Linear interpolation between order statistics, as numpy's default; for tensors of any size."""
    ordered = values.flatten().sort().values
    found: list[float] = []
    for share in shares:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        lower, upper = float(ordered[low]), float(ordered[min(low + 1, len(ordered) - 1)])
        found.append(lower + (place - low) * (upper - lower))
    return found


def _divergence(kld: Tensor) -> Divergence:
    mean = _mean(kld)
    median, p90, p99, p999, largest = quantiles(kld, (0.5, 0.9, 0.99, 0.999, 1))
    return Divergence(
        mean=mean.mean,
        standard_error=mean.standard_error,
        median=median,
        p90=p90,
        p99=p99,
        p999=p999,
        max=largest,
        histogram=_histogram(kld),
    )


def _histogram(values: Tensor) -> tuple[int, ...]:
    """Counts between `HISTOGRAM_EDGES`, and outside of them; a value on an edge counts as above."""
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=values.dtype, device=values.device)
    bins = torch.bucketize(values.flatten(), edges, right=True)
    return tuple(torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) + 1).tolist())


def _mean(values: Tensor) -> Mean:
    """values (windows, tokens) float64."""
    windows = values.mean(1)
    error = float(windows.std() / math.sqrt(len(windows))) if len(windows) > 1 else math.nan
    return Mean(mean=float(windows.mean()), standard_error=error)


def _exp(loss: Mean) -> Mean:
    mean = float(torch.tensor(loss.mean, dtype=torch.float64).exp())  # infinity, where math.exp raises
    return Mean(mean=mean, standard_error=mean * loss.standard_error)


def _root(square: Mean) -> Mean:
    """Square root of a mean, its error by the delta method, which has none for zero: there the square's is kept."""
    root = math.sqrt(square.mean)
    return Mean(mean=root, standard_error=square.standard_error / (2 * root) if root else square.standard_error)
