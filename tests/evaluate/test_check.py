"""What fails and what passes: statistics against known quantiles and by simulation, each kind of evidence, and the
files that are written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from xml.etree import ElementTree

import numpy as np
import pytest

from quantkit.documents.baseline import Baseline, ConversionLosses
from quantkit.documents.evaluation import ReferenceFile
from quantkit.evaluate.check.baseline import (
    check_comparable,
    read_evaluation,
)
from quantkit.evaluate.check.reports import junit_xml, markdown, regression_lines
from quantkit.evaluate.check.run import check
from quantkit.evaluate.check.statistics import allowed, of_many, paired, student
from quantkit.evaluate.check.verdict import Check, Limits, Verdict
from tests.evaluate.evaluations import Made, evaluation

CLEAN = Made(seed=1)
REFERENCE_FILE = ReferenceFile(path="r", versions={}, device="cpu", top=512, mean_rest=0.01, kld="", not_available={})


def verdict(
    now: Made,
    limits: Limits | None = None,
    old_losses: ConversionLosses | None = None,
    new_losses: ConversionLosses | None = None,
) -> Verdict:
    """Against CLEAN."""
    old, new = ({} if losses is None else {"int4": losses} for losses in (old_losses, new_losses))
    (found,) = check(evaluation(now), Baseline(evaluation=evaluation(CLEAN), conversions=old), limits or Limits(), new)
    return found


def failed(found: Verdict) -> list[str]:
    return [check.name for check in found.regressions]


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("windows", "quantile"), [(8, 8.47), (16, 5.49), (31, 4.65), (121, 4.15), (10**6, 4.0)])
def test_quantiles_of_student(windows: int, quantile: float) -> None:
    """As rare as four sigmas of a normal; quantiles by integration of the density."""
    assert student(4, windows) == pytest.approx(quantile, rel=0.02)


def test_few_windows_say_little() -> None:
    assert student(4, 1) == math.inf
    assert student(4, 2) > 1e4
    assert student(40, 2) == math.inf


@pytest.mark.parametrize("comparisons", [1, 8, 44_544])
def test_many_comparisons_share_one_tail(comparisons: int) -> None:
    tail = NormalDist().cdf(-of_many(3, comparisons)) * comparisons
    assert tail == pytest.approx(NormalDist().cdf(-3), rel=1e-6)
    assert of_many(40, comparisons) >= 40  # beyond the smallest float


def test_limits_are_kept_by_chance_as_often_as_they_say() -> None:
    """Clean conversions with luck and text noise: at two sigmas 2.3 % of them fail, and drift does not pass."""
    random = np.random.default_rng(0)
    hard = np.exp(random.standard_normal(40))
    failures = {0.0: 0, 0.3: 0}
    for _ in range(3000):
        was, found = (
            hard * (1 + 0.03 * random.standard_normal()) * (1 + 0.2 * random.standard_normal(40)) for _ in range(2)
        )
        for drift in failures:
            pair = paired(list(was), list(found * (1 + drift)))
            failures[drift] += pair.change > allowed(pair, 2, 0.03 * pair.was)
    assert 0.01 < failures[0.0] / 3000 < 0.035
    assert failures[0.3] > 2800


def test_a_bug_in_few_windows_does_not_hide_behind_its_own_scatter() -> None:
    was = [1 + 0.1 * (row % 7) for row in range(60)]
    found = [*was[:-1], was[-1] + 100]
    pair = paired(was, found)
    assert pair.standard_error > 1 > pair.change / 2
    assert pair.change > allowed(pair, 4, 0.015 * pair.was)


# ------------------------------------------------------------------------------------------------------------ evidence


@pytest.mark.parametrize("seed", range(2, 42))
def test_clean_seeds_pass(seed: int) -> None:
    assert failed(verdict(Made(seed=seed))) == []


def test_limits_are_not_below_what_was_measured() -> None:
    """Spreads from seed to seed, of benchmarks/regression_gate.py."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "regression_gate.json"
    clean, limits = json.loads(path.read_text(encoding="utf-8"))["clean"], Limits()
    assert clean["false alarms"] == clean["every run against every other"]["with an alarm"] == 0
    for found in clean["spread from seed to seed, relative"].values():
        assert found["mean KLD"] <= limits.spread
        assert found["mean loss, of the mean KLD"] <= limits.spread * limits.loss_times
        for name, spread in found.items():
            if name.startswith("squared hidden error"):
                assert spread <= limits.layer_spread
    for found in clean["spread of log losses"].values():
        assert found["common to a kind, largest"] <= limits.kind_spread
        assert found["of a linear of a kind, largest kind"] <= limits.member_spread
        assert found["of the linear that varies most"] <= limits.linear_spread


def test_the_same_evaluation_passes_with_the_tightest_limits() -> None:
    assert verdict(CLEAN, limits=Limits(sigmas=1, spread=0, divergence_floor=0)).passed


@pytest.mark.parametrize(
    ("made", "names", "words"),
    [
        (Made(seed=2, kld=1.3), ["mean KLD"], "mean KLD got worse: 0.01"),
        (Made(seed=2, domains={"prose": 1.5}), ["KLD of a domain"], "KLD of a domain: prose got worse"),
        (Made(seed=2, layer=(1, 1.5)), ["hidden error"], "after layer 1 got worse"),
        (Made(seed=2, experts={(2, 7): 1.4}), ["error of an expert's tokens"], "layer 2 expert 7 got worse: 0.06"),
        (Made(seed=2, nbytes=1_002_000), ["size"], "size got worse: 1,000,000 bytes -> 1,002,000 (+0.2 %)"),
    ],
)
def test_what_got_worse_is_named(made: Made, names: list[str], words: str) -> None:
    found = verdict(made)
    assert set(names) <= set(failed(found))
    (line,) = [line for line in regression_lines([found]) if names[0] in line]
    assert line.startswith("int4: ")
    assert words in line
    assert "\n" not in line


def test_later_layers_inherit_an_error() -> None:
    (line,) = [
        check.line for check in verdict(Made(seed=2, layer=(1, 1.5))).regressions if check.name == "hidden error"
    ]
    assert "worse after 2 layers, first here" in line
    assert "router agreement 97.00% -> 97.00%" in line


def test_a_growth_that_all_experts_share_names_none() -> None:
    everywhere = {(1, expert): 2 + 0.02 * expert for expert in range(12)}
    assert "error of an expert's tokens" not in failed(verdict(Made(seed=2, experts=everywhere)))


def test_perplexity_alone_can_fail() -> None:
    now = evaluation(Made(seed=1))
    (one,) = now.candidates
    windows = one.result.windows
    assert windows is not None
    worse = windows.model_copy(update={"loss": tuple(loss + 0.01 for loss in windows.loss)})
    one = one.model_copy(update={"result": one.result.model_copy(update={"windows": worse})})
    (found,) = check(
        now.model_copy(update={"candidates": (one,)}), Baseline(evaluation=evaluation(CLEAN)), Limits(), {}
    )
    assert failed(found) == ["perplexity"]


def test_absolute_limits() -> None:
    limits = Limits(max_kld=0.01, max_perplexity_increase=0.001)
    assert failed(verdict(CLEAN, limits=limits)) == ["mean KLD, absolute", "perplexity above the reference's"]
    assert verdict(CLEAN, limits=Limits(max_kld=0.1, max_perplexity_increase=0.1)).passed


def test_without_hidden_states_the_rest_is_checked(tmp_path: Path) -> None:
    document = json.loads(evaluation(CLEAN, reference_file=REFERENCE_FILE).to_json())
    found = document["candidates"][0]["result"]
    found["windows"]["layers"] = [[]] * len(found["layers"])
    for layer in found["layers"]:
        layer |= {"hidden_error": None, "expert_errors": None, "expert_tokens": None}
    (tmp_path / "e.json").write_text(json.dumps(document), encoding="utf-8")
    made = read_evaluation(tmp_path / "e.json")
    check_comparable(made, Baseline(evaluation=made), tmp_path)
    (done,) = check(made, Baseline(evaluation=made), Limits(), {})
    assert [own.name for own in done.checks] == ["size", "mean KLD", "perplexity", "KLD of a domain"]
    assert "layers and experts were not compared" in done.notes[0]


def test_numbers_that_are_none_fail() -> None:
    now = Made(seed=2, kld=math.nan)
    assert {"mean KLD", "perplexity", "KLD of a domain"} <= set(failed(verdict(now)))


def test_better_is_said() -> None:
    assert verdict(Made(seed=2, kld=0.5)).notes == ("better than the baseline: --update-baseline keeps it so",)


# ---------------------------------------------------------------------------------------------------------------- text


def test_junit_has_a_case_for_each_check() -> None:
    found = [verdict(Made(seed=2, kld=1.3)), replace(verdict(CLEAN), candidate="a<b>\x00")]
    root = ElementTree.fromstring(junit_xml(found))
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["int4", "a<b>?"]
    assert root.get("tests") == str(sum(len(own.checks) for own in found))
    assert [suite.get("failures") for suite in suites] == [str(len(found[0].regressions)), "0"]
    (message,) = [failure.get("message") for case in suites[0] if case.get("name") == "mean KLD" for failure in case]
    assert message == found[0].regressions[0].line


def test_markdown_puts_failures_on_top_and_escapes() -> None:
    made = replace(verdict(Made(seed=2, kld=1.3)), candidate="a|b<i>", notes=("a *note*",))
    text = markdown([made])
    assert text.startswith(f"## quantkit check: {len(made.regressions)} regressions\n\n### a\\|b\\<i\\>\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith("| ❌ | mean KLD")
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    assert "- a \\*note\\*" in text
    assert markdown([verdict(CLEAN)]).startswith("## quantkit check: nothing got worse\n")


def test_lines() -> None:
    made = Check(name="n", place="p", was="1", found="2", limit="+5 %", change="+100 %", passed=False, detail="d")
    assert regression_lines([Verdict("c", (made,))]) == ["c: n: p got worse: 1 -> 2 (+100 %), allowed +5 %; d"]
