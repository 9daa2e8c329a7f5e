"""What a choice of types expected, beside what was measured: two plots with their numbers as tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest

from quantkit.documents.read import read_documents
from quantkit.report.build import report_of
from quantkit.report.contents import Figure, Note
from quantkit.report.page import page
from quantkit.report.predicted import predicted
from quantkit.report.scored import ScoredCheckpoint, scored_checkpoints
from tests.report.jobs import conversion, written

CURVE: list[list[Any]] = [[2_000_000, 0.4], [4_000_000, 0.05], [8_000_000, 0.002]]


def made(folder: Path, name: str, expected: float, measured: float, curve: object = None) -> Path:
    document = conversion(kld=measured)
    document["recipe"]["outputs"][0] |= {"predicted_kl": expected, "predicted_curve": curve or []}
    return written(folder / name, document).parent


def checkpoints(*folders: Path) -> tuple[ScoredCheckpoint, ...]:
    return scored_checkpoints(read_documents(folders)).checkpoints


def figures_of(*folders: Path) -> list[Figure]:
    note, *found = predicted(checkpoints(*folders))
    assert isinstance(note, Note)
    assert all(isinstance(block, Figure) for block in found)
    return cast("list[Figure]", found)


def test_expected_against_measured(tmp_path: Path) -> None:
    found = figures_of(made(tmp_path, "a", 0.02, 0.03), made(tmp_path, "b", 0.1, 0.09))
    (one,) = found  # no curve is known
    assert one.table.rows == (("a", "0.02", "0.0300 ± 0.0010", "1.50"), ("b", "0.1", "0.0900 ± 0.0010", "0.90"))
    line, *points = cast("Any", one.spec)["data"]
    assert line["x"] == line["y"]
    assert [(point["x"], point["y"], point["name"]) for point in points] == [
        ([0.02], [0.03], "a"),
        ([0.1], [0.09], "b"),
    ]
    low, high = cast("Any", one.spec)["layout"]["xaxis"]["range"]
    assert low < math.log10(0.02)
    assert high > math.log10(0.1)


def test_the_curve_over_sizes_with_the_chosen_one(tmp_path: Path) -> None:
    _, one = figures_of(made(tmp_path, "a", 0.05, 0.06, CURVE), made(tmp_path, "b", 0.1, 0.09))
    line, ring, point = cast("Any", one.spec)["data"]
    assert (line["x"], line["y"]) == ([2.0, 4.0, 8.0], [0.4, 0.05, 0.002])
    assert (ring["x"], ring["y"], ring["marker"]["symbol"]) == ([4.0], [0.05], "circle-open")
    assert (point["x"], point["y"], point["marker"]["symbol"]) == ([4.0], [0.06], "circle")
    assert point["error_y"]["array"] == [0.001]
    assert one.table.rows == (("a", "2.00 MB", "0.4"), ("a", "4.00 MB", "0.05"), ("a", "8.00 MB", "0.002"))
    assert one.summary == "From 0.002 to 0.4 nats."


def test_it_is_part_of_the_page(tmp_path: Path) -> None:
    folder = made(tmp_path, "a<b", 0.05, 0.06, CURVE)
    report = report_of(scored_checkpoints(read_documents([folder])), None)
    (section,) = [section for section in report.sections if section.anchor == "expected"]
    assert [block.title for block in section.blocks if isinstance(block, Figure)] == [
        "Expected and measured KL divergence",
        "Expected KL divergence of other sizes",
    ]
    assert "Expected KL divergence of other sizes" in page(report)
    for block in section.blocks:
        if isinstance(block, Figure):
            assert "<b>a&lt;b</b>" in json.dumps(block.spec, allow_nan=False)


@pytest.mark.parametrize(
    "curve",
    [3, "x", {}, [3], [[1]], [[1, "x"]], [[-1, 0.1]], [[1, 0.0]], [[1, math.inf]], [[True, None]], [[1.5, 0.1]]],
)
def test_a_curve_that_is_none_is_left_out(curve: object, tmp_path: Path) -> None:
    assert len(figures_of(made(tmp_path, "a", 0.05, 0.06, curve))) == 1


def test_without_a_choice_there_is_nothing(tmp_path: Path) -> None:
    assert list(predicted(checkpoints(written(tmp_path / "plain", conversion()).parent))) == []
