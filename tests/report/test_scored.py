"""Which scores belong to which checkpoint, which can be compared, and which are on the front."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from quantkit.documents.read import read_documents
from quantkit.documents.values import Mean
from quantkit.report.build import report_of
from quantkit.report.contents import Figure
from quantkit.report.markdown import markdown
from quantkit.report.quality import change, comparable, survival
from quantkit.report.scored import ScoredCheckpoints, front, scored_checkpoints
from tests.report.jobs import conversion, evaluation, scores, written


def checkpoints(*paths: Path) -> ScoredCheckpoints:
    return scored_checkpoints(read_documents(paths))


def test_a_candidate_is_the_conversion_whose_folder_it_was_read_from(tmp_path: Path) -> None:
    folder = written(tmp_path / "w4", conversion(nbytes=40)).parent
    other = written(tmp_path / "w3", conversion(nbytes=30)).parent
    candidates = {str(folder / "model.gguf"): (40, 0.03), "/elsewhere/w3": (30, 0.1), "/elsewhere/x": (40, 0.2)}
    found = checkpoints(folder, other, written(tmp_path, evaluation(candidates), "e.json"))
    assert [(one.label, one.conversion and one.conversion.label) for one in found.checkpoints] == [
        ("w4", "w4"),
        ("w3", "w3"),
        ("x", None),
    ]
    assert [one.score.kld.mean for one in found.checkpoints if one.score] == [0.03, 0.1, 0.2]


def test_scores_of_other_bytes_are_not_those_of_a_conversion(tmp_path: Path) -> None:
    folder = written(tmp_path / "w4", conversion(nbytes=40, kld=0.5)).parent
    found = checkpoints(folder, written(tmp_path, evaluation({str(folder): (41, 0.03)}), "e.json"))
    own, stale = found.checkpoints
    assert (own.score and own.score.measured_by, own.score and own.score.kld.mean) == (
        "validation of the conversion",
        0.5,
    )
    assert (stale.conversion, stale.nbytes) == (None, 41)


def test_a_candidate_whose_path_cannot_be_is_no_conversion(tmp_path: Path) -> None:
    folder = written(tmp_path / "w4", conversion(nbytes=40)).parent
    found = checkpoints(folder, written(tmp_path, evaluation({"w4\0": (40, 0.03)}), "e.json"))
    assert [one.conversion is None for one in found.checkpoints] == [False, True]


def test_names_that_occur_twice_are_told_apart(tmp_path: Path) -> None:
    folders = [written(tmp_path / place / "w4", conversion()).parent for place in ("a", "b")]
    assert [one.label for one in checkpoints(*folders).checkpoints] == ["a/w4", "b/w4"]
    deeper = [written(tmp_path / place / "c" / "w4", conversion()).parent for place in ("a", "b")]
    assert len({one.label for one in checkpoints(*deeper).checkpoints}) == 2


def test_lower_bounds_are_not_compared_with_whole_divergences(tmp_path: Path) -> None:
    whole = evaluation({"w4": (40, 0.03), "w3": (30, 0.1)})
    bound = {**evaluation({"w4": (40, 0.029)}, floor=None), "reference_file": {"path": "made/r.file", "top": 512}}
    for layer in bound["candidates"][0]["result"]["layers"]:
        layer.update(hidden_error=None, expert_errors=None)
    files = [written(tmp_path, document, name) for name, document in (("a.json", whole), ("b.json", bound))]
    found = checkpoints(*files)
    assert [len(group) for group in comparable(found.checkpoints)] == [2, 1]
    text = markdown(report_of(found))
    assert ("| ≥ 0.0290 ± 0.0029 |" in text, "| 0.0300 ± 0.0030 |" in text) == (True, True)
    assert ("file of its statistics" in text, "KL divergences are lower bounds" in text) == (True, True)
    assert "quantkit evaluate made/r.file w4 --device cpu -o evaluation.json" in text
    alone = [block for section in report_of(checkpoints(files[1])).sections for block in section.blocks]
    assert "Error of the hidden state, layer by layer" not in [getattr(block, "title", "") for block in alone]


def test_only_scores_of_the_same_text_are_compared(tmp_path: Path) -> None:
    validated = [written(tmp_path / name, conversion(nbytes=size)).parent for name, size in (("a", 10), ("b", 20))]
    scored = written(tmp_path, evaluation({"c": (30, 0.01)}), "e.json")
    found = checkpoints(*validated, scored)
    assert [[one.label for one in group] for group in comparable(found.checkpoints)] == [["a", "b"], ["c"]]
    notes = [
        block for section in report_of(found).sections for block in section.blocks if "different text" in str(block)
    ]
    assert len(notes) == 1


def test_the_front_has_what_nothing_beats_in_size_and_divergence(tmp_path: Path) -> None:
    candidates = {"small": (10, 0.2), "beaten": (12, 0.3), "even": (20, 0.2), "good": (20, 0.1), "best": (30, 0.01)}
    found = checkpoints(written(tmp_path, evaluation(candidates), "e.json"))
    assert [one.label for one in front(found.checkpoints)] == ["small", "good", "best"]


def test_a_divergence_that_is_no_number_is_on_no_front(tmp_path: Path) -> None:
    document: dict[str, Any] = evaluation({"a": (10, 0.2), "b": (20, 0.1)})
    document["candidates"][0]["result"]["overall"]["kld"]["mean"] = None
    found = checkpoints(written(tmp_path, document, "e.json"))
    assert [one.label for one in front(found.checkpoints)] == ["b"]


def test_the_ratio_of_a_validation_becomes_a_difference_of_losses(tmp_path: Path) -> None:
    (found,) = checkpoints(written(tmp_path / "w4", conversion(kld=0.02))).checkpoints
    assert found.score is not None
    assert found.score.log_ratio.mean == pytest.approx(0.02)
    assert found.score.log_ratio.standard_error == pytest.approx(0.002 / math.exp(0.02))
    assert change(found.score.log_ratio).mean == pytest.approx(math.expm1(0.02))
    assert change(Mean(mean=1e9, standard_error=1)).mean == math.inf


def test_the_tail_comes_from_the_histogram_if_there_is_one(tmp_path: Path) -> None:
    document: dict[str, Any] = evaluation({"a": (10, 0.2)})
    kld = document["candidates"][0]["result"]["overall"]["kld"]
    counts = [10] + [0] * 36 + [30]
    counts[5] = 60
    kld["histogram"] = counts
    found = checkpoints(written(tmp_path, document, "e.json"))
    assert found.checkpoints[0].result is not None
    points = survival(found.checkpoints[0].result.overall.kld, 100)
    assert points[0] == (pytest.approx(1e-7), 0.9)
    assert points[3] == (pytest.approx(10**-6.25), 0.9)
    assert points[4] == (pytest.approx(1e-6), 0.9)
    assert points[5] == (pytest.approx(10**-5.75), 0.3)
    assert points[-1] == (pytest.approx(100), 0.3)


def test_without_a_histogram_the_tail_comes_from_the_quantiles(tmp_path: Path) -> None:
    found = checkpoints(written(tmp_path, evaluation({"a": (10, 0.1)}), "e.json"))
    assert found.checkpoints[0].result is not None
    kld = found.checkpoints[0].result.overall.kld
    assert survival(kld, 4000) == [(0.05, 0.5), (0.2, 0.1), (0.8, 0.01), (2.0, 0.001), (4.0, 1 / 4000)]
    assert scores(0.1)["kld"]["max"] == 4.0


def test_what_a_choice_of_types_expected_stands_beside_what_was_measured(tmp_path: Path) -> None:
    made = conversion(kld=0.03)
    made["recipe"]["outputs"][0]["predicted_kl"] = 0.02
    chosen = written(tmp_path / "chosen", made).parent
    plain = written(tmp_path / "plain", conversion()).parent
    sections = {section.anchor: section for section in report_of(checkpoints(chosen, plain), None).sections}
    _, figure = sections["expected"].blocks
    assert isinstance(figure, Figure)
    assert figure.table.rows == (("chosen", "0.02", "0.0300 ± 0.0010", "1.50"),)
    assert "expected" not in {section.anchor for section in report_of(checkpoints(plain), None).sections}
