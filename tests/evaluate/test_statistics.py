"""Token scores -> the numbers of evaluation.json, against numpy; the document there and back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from quantkit.documents.evaluation import HISTOGRAM_EDGES, CheckpointFacts, Evaluation, ScoringProtocol
from quantkit.documents.values import Mean
from quantkit.evaluate.compare import Comparison, LayerScore
from quantkit.evaluate.statistics import quantiles, result_of, scores_of
from quantkit.evaluate.token_scores import TokenScores


@pytest.fixture(scope="module")
def tokens() -> TokenScores:
    random = torch.Generator().manual_seed(0)
    reference = 2 + torch.rand(6, 50, generator=random, dtype=torch.float64)
    kld = torch.rand(6, 50, generator=random, dtype=torch.float64)
    return TokenScores(reference, reference + kld - 0.4, kld, kld < 0.5)


def by_windows(values: np.ndarray) -> tuple[float, float]:
    means = values.mean(1)
    return means.mean(), means.std(ddof=1) / math.sqrt(len(means))


def test_scores_are_numpy_s(tokens: TokenScores) -> None:
    found = scores_of(tokens)
    reference, candidate, kld = (t.numpy() for t in (tokens.reference_nll, tokens.candidate_nll, tokens.kld))
    assert (found.windows, found.tokens) == (6, 300)
    for value, expected in (
        (found.log_ratio, by_windows(candidate - reference)),
        (found.same_top, by_windows((kld < 0.5).astype(float))),
    ):
        assert (value.mean, value.standard_error) == pytest.approx(expected)
    for value, nll in ((found.reference_perplexity, reference), (found.perplexity, candidate)):
        mean, error = by_windows(nll)
        assert (value.mean, value.standard_error) == pytest.approx((math.exp(mean), math.exp(mean) * error))
    assert (found.kld.mean, found.kld.standard_error) == pytest.approx(by_windows(kld))
    expected = [*np.quantile(kld, [0.5, 0.9, 0.99, 0.999]), kld.max()]
    assert [found.kld.median, found.kld.p90, found.kld.p99, found.kld.p999, found.kld.max] == pytest.approx(expected)
    counts, _ = np.histogram(kld, [-np.inf, *HISTOGRAM_EDGES, np.inf])
    assert found.kld.histogram == tuple(counts)
    square = (np.exp(-candidate) - np.exp(-reference)) ** 2
    mean, error = by_windows(square)
    change = found.rms_probability_change
    assert (change.mean, change.standard_error) == pytest.approx((math.sqrt(mean), error / (2 * math.sqrt(mean))))


def test_the_ratio_is_paired(tokens: TokenScores) -> None:
    hard = torch.linspace(0, 3, 6, dtype=torch.float64)[:, None]
    harder = TokenScores(tokens.reference_nll + hard, tokens.candidate_nll + hard, tokens.kld, tokens.same_top)
    assert scores_of(harder).log_ratio.standard_error == pytest.approx(scores_of(tokens).log_ratio.standard_error)
    assert scores_of(harder).perplexity.standard_error > 10 * scores_of(tokens).perplexity.standard_error


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_quantiles_are_interpolated(n: int) -> None:
    values = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    shares = (0.0, 0.1, 0.5, 0.999, 1.0)
    assert quantiles(values, shares) == pytest.approx(np.quantile(values.numpy(), shares).tolist())


def test_domains_are_their_windows(tokens: TokenScores) -> None:
    layers = (LayerScore(0, 0.1, None, (0.01,) * 6), LayerScore(1, 0.2, 0.9, (0.04,) * 6, (0, 7), (math.nan, 1 / 3)))
    result = result_of(Comparison(tokens, layers), ("a", "b", "a", "a", "c", "b"))
    assert list(result.domains) == ["a", "b", "c"]
    assert result.domains["a"].kld.mean == pytest.approx(float(tokens.kld[[0, 2, 3]].mean()))
    assert sum(scores.tokens for scores in result.domains.values()) == result.overall.tokens == 300
    assert math.isnan(result.domains["c"].kld.standard_error)
    assert [(layer.hidden_error, layer.router_agreement) for layer in result.layers] == [(0.1, None), (0.2, 0.9)]
    assert [layer.expert_tokens for layer in result.layers] == [None, (0, 7)]
    assert result.layers[1].model_dump(mode="json")["expert_errors"] == [None, 0.3333333]
    assert result.windows is not None
    assert result.windows.kld == pytest.approx(tokens.kld.mean(1).tolist(), rel=1e-6)
    assert result.windows.loss == pytest.approx(tokens.candidate_nll.mean(1).tolist(), rel=1e-6)
    assert np.mean(result.windows.same_top) == pytest.approx(result.overall.same_top.mean)
    assert result.windows.layers == ((0.01,) * 6, (0.04,) * 6)


def test_losses_beyond_exp_and_equal_models_give_numbers() -> None:
    zero = torch.zeros(2, 3, dtype=torch.float64)
    same = scores_of(TokenScores(zero, zero, zero, zero == 0))
    assert (same.rms_probability_change.mean, same.kld.max, same.same_top.mean) == (0, 0, 1)
    assert scores_of(TokenScores(zero, zero + 1000, zero, zero == 0)).perplexity.mean == math.inf


def facts() -> CheckpointFacts:
    return CheckpointFacts(name="m", path="a/m", format="BF16", fingerprint="0", weights=4, nbytes=8, notes=())


def test_the_document_there_and_back(tokens: TokenScores) -> None:
    protocol = ScoringProtocol(
        name="windows", description="", context=51, max_windows_per_file=None, scored_per_window=50
    )
    found = Evaluation.model_validate(
        {
            "versions": {},
            "device": "cpu",
            "arithmetic": "",
            "protocol": protocol,
            "text": (),
            "tokens_sha256": "0",
            "reference": facts(),
            "noise_floor": None,
            "candidates": [{"model": facts(), "result": result_of(Comparison(tokens, ()), ("a",) * 5 + ("b",))}],
        }
    )
    text = found.to_json()
    assert "seconds" not in json.loads(text)
    (candidate,) = json.loads(text)["candidates"]
    assert candidate["result"]["domains"]["b"]["kld"]["standard_error"] is None
    assert Evaluation.model_validate_json(text).to_json() == text
    assert (facts().bpw, Mean(mean=1, standard_error=0.25).shown(2)) == (16, "1.00 ± 0.25")


def test_numbers_of_a_broken_model_fit_a_table() -> None:
    from quantkit.documents.values import estimate, percent
    from quantkit.evaluate.check.verdict import percent as change

    assert estimate(6.62, 0.56, 2) == "6.62 ± 0.56"
    assert estimate(1.2345e300, 1e299, 4) == "1.2e+300 ± 1.0e+299"
    assert percent(0.9244, float("nan")) == "92.44% ± -"
    assert (change(0.042), change(1e30), change(float("inf"))) == ("+4.2 %", "+1e+32 %", "+inf %")
