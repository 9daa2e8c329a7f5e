"""What fails and what passes: statistics against known quantiles and by simulation, each kind of evidence, what is
refused, and the files that are written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from xml.etree import ElementTree

import numpy as np
import pytest

from quantkit.documents.baseline import Baseline, ConversionLosses
from quantkit.documents.evaluation import ReferenceFile
from quantkit.errors import EvaluationError
from quantkit.evaluate.check.baseline import (
    check_comparable,
    read_baseline,
    read_evaluation,
    read_losses,
)
from quantkit.evaluate.check.reports import junit_xml, markdown, regression_lines
from quantkit.evaluate.check.run import check
from quantkit.evaluate.check.statistics import allowed, of_many, paired, student
from quantkit.evaluate.check.verdict import Check, Limits, Verdict
from tests.evaluate.evaluations import DOMAINS, Made, evaluation, write

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


# -------------------------------------------------------------------------------------------------------------- losses


def losses(seed: int = 0, spread: float = 0.03, calibration: str = "a", **factors: float) -> ConversionLosses:
    """Six layers of a dense linear and sixteen experts. ``factors``: by a part of the name with _ for a dot."""
    random = np.random.default_rng(seed)
    names = [f"layers.{layer}.{part}" for layer in range(6) for part in ("o.weight", *(f"e.{e}.d" for e in range(16)))]
    found = {name: 0.01 * math.exp(spread * random.standard_normal()) for name in names}
    for part, factor in factors.items():
        for name in names:
            if part.replace("_", ".") in name:
                found[name] *= factor
    return ConversionLosses(calibration={"data": calibration}, losses=found)


def quantkit_json(calibration: object, tensors: dict[str, object]) -> dict[str, object]:
    """What a check needs of it, and what none is without."""
    size = {"output": "int4", "tensor_bytes": 8, "bpw": 4.0}
    return {"quantkit": "0.1.0", "job": {}, "recipe": {"calibration": calibration}, **size, "tensors": tensors}


@pytest.mark.parametrize("seed", range(1, 11))
def test_losses_of_clean_seeds_pass(seed: int) -> None:
    found = verdict(CLEAN, None, losses(0), losses(seed))
    assert failed(found) == []
    assert [check.name for check in found.checks[-2:]] == ["loss of a kind of linear", "loss of a linear"]


@pytest.mark.parametrize(
    ("factors", "names", "place"),
    [
        ({"o_weight": 1.25}, ["loss of a kind of linear"], "layers.*.o.weight"),
        ({"e_7_d": 2.0}, ["loss of a linear"], "e.7.d"),
        ({"3_e_7_d": 2.0}, ["loss of a linear"], "layers.3.e.7.d"),
        ({"layers": 1.5}, ["loss of a kind of linear"], "layers.*.e.*.d"),
    ],
)
def test_linears_that_got_worse_are_named(factors: dict[str, float], names: list[str], place: str) -> None:
    regressions = verdict(CLEAN, None, losses(0), losses(1, **factors)).regressions
    assert set(names) <= {check.name for check in regressions}
    assert place in next(check.place for check in regressions if check.name == names[0])


def test_losses_that_are_no_comparison_are_noted() -> None:
    def notes(found: ConversionLosses | None) -> str:
        done = verdict(CLEAN, None, losses(0), found)
        assert done.passed
        return " ".join(done.notes)

    assert "no quantkit.json" in notes(None)
    assert "calibration differs" in notes(losses(1, calibration="b", layers=2.0))
    assert "96" not in notes(losses(1))
    assert "102 linears of the baseline have no loss now" in notes(losses(1).model_copy(update={"losses": {}}))
    assert verdict(CLEAN, Limits(losses=False), losses(0), losses(1, layers=2.0)).passed


def test_losses_that_are_gone_are_noted_and_those_that_are_no_number_fail(tmp_path: Path) -> None:
    clean = losses(1)
    kept = {name: loss for name, loss in clean.losses.items() if ".o." not in name}
    fewer = verdict(CLEAN, None, losses(0), clean.model_copy(update={"losses": kept}))
    assert fewer.passed
    assert fewer.notes == ("6 linears of the baseline have no loss now, layers.0.o.weight is the first",)
    (tmp_path / "out").mkdir()
    written = quantkit_json(None, {"a": {"scheme": {}, "relative_loss": None}, "b": {"scheme": {}}})
    (tmp_path / "out" / "quantkit.json").write_text(json.dumps(written), encoding="utf-8")
    read = read_losses(evaluation(Made(path="out")), tmp_path)["int4"].losses
    assert list(read) == ["a"]
    assert math.isnan(read["a"])
    broken = verdict(CLEAN, None, losses(0), losses(1, **{"3_e_7_d": math.nan}))
    assert "layers.3.e.7.d" in {check.place for check in broken.regressions}


def test_losses_beyond_all_measure_are_compared() -> None:
    tiny, huge = (losses(1, **{"3_e_7_d": factor}) for factor in (1e-300, 1e300))
    assert failed(verdict(CLEAN, None, tiny, huge)) != []
    assert failed(verdict(CLEAN, None, huge, tiny)) == []


def test_losses_come_from_the_folder_that_was_evaluated(tmp_path: Path) -> None:
    written = quantkit_json(
        {"data": ["x"], "seed": 3}, {"a": {"scheme": {}, "relative_loss": 0.0123456}, "b": {"scheme": {}}}
    )
    for folder in ("out", "gguf"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "quantkit.json").write_text(json.dumps(written), encoding="utf-8")
    (tmp_path / "gguf" / "m.gguf").touch()
    made = [Made(name=name, path=path) for name, path in (("x", "out"), ("y", "gguf/m.gguf"), ("z", "absent"))]
    found = read_losses(evaluation(*made), tmp_path)
    assert list(found) == ["x", "y"]
    assert found["x"] == found["y"] == ConversionLosses(calibration={"data": ["x"]}, losses={"a": 0.01235})
    (tmp_path / "out" / "quantkit.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        EvaluationError, match="is not a record of a conversion of this version: quantkit: Field required"
    ):
        read_losses(evaluation(*made), tmp_path)


# ------------------------------------------------------------------------------------------------------------ refusals


CHANGES: dict[str, Callable[[Path], Path]] = {
    "another text": lambda path: write(path, CLEAN, tokens_sha256="bb" * 32),
    "another reference": lambda path: write(
        path, CLEAN, reference=evaluation(CLEAN).reference.model_copy(update={"fingerprint": "22"})
    ),
    "another context": lambda path: write(
        path, CLEAN, protocol=evaluation(CLEAN).protocol.model_copy(update={"context": 256})
    ),
    "another protocol": lambda path: write(
        path, CLEAN, protocol=evaluation(CLEAN).protocol.model_copy(update={"name": "llama.cpp"})
    ),
    "another share of the reference's logits: all in the baseline, 512 a token": lambda path: write(
        path, CLEAN, reference_file=REFERENCE_FILE
    ),
    "another domains of the windows": lambda path: write(path, CLEAN, window_domains=tuple(reversed(DOMAINS))),
}


@pytest.mark.parametrize("words", CHANGES)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, words: str) -> None:
    found = read_evaluation(CHANGES[words](tmp_path / "e.json"))
    with pytest.raises(EvaluationError, match=f"not comparable, {words}") as refused:
        check_comparable(found, Baseline(evaluation=evaluation(CLEAN)), tmp_path / "b.json")
    assert "\n" not in refused.value.message
    check_comparable(found, Baseline(evaluation=found), tmp_path / "b.json")


def test_no_candidate_passes_unseen() -> None:
    two = [CLEAN, replace(CLEAN, name="gguf")]
    both, one = evaluation(*two), evaluation(CLEAN)
    for found, old, side in ((one, both, "evaluation"), (both, one, "baseline")):
        with pytest.raises(EvaluationError, match=f"candidate gguf: is not in the {side}, which has int4"):
            check(found, Baseline(evaluation=old), Limits(), {})
        assert [v.candidate for v in check(found, Baseline(evaluation=old), Limits(), {}, ["int4"])] == ["int4"]
    with pytest.raises(EvaluationError, match="found 2 of this name"):
        check(evaluation(CLEAN, CLEAN), Baseline(evaluation=one), Limits(), {})


def damaged(change: Callable[[dict[str, object]], object]) -> str:
    document = json.loads(evaluation(CLEAN).to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not an evaluation of this version: Invalid JSON"),
        ("[1]", "is not an evaluation of this version"),
        (damaged(lambda d: d.update(schema_version=9)), "schema_version"),
        (damaged(lambda d: d.update(candidates=[])), "has no candidates"),
        (damaged(lambda d: d.update(window_domains=[])), "no scores by window"),
        (damaged(lambda d: d["candidates"][0]["result"].pop("windows")), "no scores by window"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["result"]["windows"]["kld"].pop()), "contradict"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["result"]["layers"][1]["expert_tokens"].pop()), "contradict"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["model"].update(nbytes=10**400)), "model.nbytes"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["result"]["layers"][1].update(expert_tokens=[-1] * 12)), "expert_tokens"),  # type: ignore[index]
    ],
)
def test_damaged_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=words) as refused:
        read_evaluation(path)
    assert refused.value.message.startswith(f"{path}: ")
    assert "\n" not in refused.value.message


def test_evaluations_that_come_from_no_file_are_refused_too() -> None:
    with pytest.raises(EvaluationError, match="has no candidates"):
        read_losses(evaluation(), Path())
    baseline = Baseline(evaluation=evaluation(CLEAN))
    for made, words in (
        (evaluation(), "has no candidates"),
        (evaluation(CLEAN, window_domains=()), "has no scores by"),
    ):
        with pytest.raises(EvaluationError, match=f"^evaluation: {words}"):
            check_comparable(made, baseline, Path("b.json"))


def test_texts_of_files_keep_to_one_line(tmp_path: Path) -> None:
    name = "a\n\x1b[31mb"
    (found,) = check(evaluation(Made(name=name, kld=9)), Baseline(evaluation=evaluation(Made(name=name))), Limits(), {})
    assert found.candidate == "'a\\n\\x1b[31mb'"
    for only in ([], ["c"]):
        with pytest.raises(EvaluationError) as refused:
            check(evaluation(Made(name=name)), Baseline(evaluation=evaluation(CLEAN)), Limits(), {}, only)
        assert refused.value.message.isprintable()
    damaged_name = damaged(lambda d: d["reference"].update(fingerprint=name))  # type: ignore[attr-defined, index]
    (tmp_path / "e.json").write_text(damaged_name, encoding="utf-8")
    with pytest.raises(EvaluationError) as refused:
        check_comparable(read_evaluation(tmp_path / "e.json"), Baseline(evaluation=evaluation(CLEAN)), Path("b.json"))
    assert refused.value.message.isprintable()


def test_few_windows_are_refused(tmp_path: Path) -> None:
    """Seven allow a mean KLD to double."""

    def cut(document: dict[str, object]) -> None:
        windows = document["candidates"][0]["result"]["windows"]  # type: ignore[index]
        for values in (windows["loss"], windows["kld"], windows["same_top"], *windows["layers"]):
            del values[7:]
        document["window_domains"] = list(DOMAINS[:7])

    path = tmp_path / "e.json"
    path.write_text(damaged(cut), encoding="utf-8")
    with pytest.raises(EvaluationError, match="found 7 windows, needed 8 to tell a regression from noise"):
        read_evaluation(path)


def test_errors_beyond_all_measure_are_compared() -> None:
    fine = evaluation(CLEAN)
    layer = fine.candidates[0].result.layers[1]
    endless = layer.model_copy(update={"expert_errors": (math.inf, *layer.expert_errors[1:])})  # type: ignore[index]
    result = fine.candidates[0].result.model_copy(
        update={"layers": (*fine.candidates[0].result.layers[:1], endless, *fine.candidates[0].result.layers[2:])}
    )
    hurt = fine.model_copy(update={"candidates": (fine.candidates[0].model_copy(update={"result": result}),)})
    (worse,) = check(hurt, Baseline(evaluation=fine), Limits(), {})
    assert failed(worse) == ["error of an expert's tokens"]
    (better,) = check(fine, Baseline(evaluation=hurt), Limits(), {})
    assert better.passed


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such file"):
        read_evaluation(tmp_path / "absent.json")
    with pytest.raises(EvaluationError, match="no such baseline"):
        read_baseline(tmp_path / "absent.json")


def test_the_baseline_there_and_back(tmp_path: Path) -> None:
    made = Baseline(evaluation=evaluation(CLEAN, seconds={"stream": 1.0}), conversions={"int4": losses(0)})
    path = tmp_path / "b.json"
    path.write_text(made.to_json(), encoding="utf-8")
    again = read_baseline(path)
    assert again.to_json() == made.to_json()
    assert again.evaluation.seconds is None
    with pytest.raises(EvaluationError, match="is a baseline of `quantkit check`, not an evaluation"):
        read_evaluation(path)


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
