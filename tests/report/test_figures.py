"""Figures are JSON that plotly takes, and say what the numbers say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest

from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.read import read_documents
from quantkit.report import figures, heat_maps
from quantkit.report.build import report_of
from quantkit.report.contents import Figure, ReportPage
from quantkit.report.linears import error_grid, expert_grid
from quantkit.report.scored import scored_checkpoints
from tests.report.jobs import conversion, evaluation, written


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ReportPage:
    folder = tmp_path_factory.mktemp("outputs")
    paths = [written(folder / name, conversion(nbytes=size)).parent for name, size in (("a", 10), ("b", 20))]
    scored = written(folder, evaluation({str(paths[0]): (10, 0.1), str(paths[1]): (20, 0.0)}), "evaluation.json")
    return report_of(scored_checkpoints(read_documents([*paths, scored])))


def figure(report: ReportPage, title: str) -> Figure:
    return next(
        block
        for section in report.sections
        for block in section.blocks
        if isinstance(block, Figure) and block.title == title
    )


def spec(found: Figure) -> Any:
    return cast("Any", found.spec)


def test_all_figures_are_json_and_have_numbers_as_a_table(report: ReportPage) -> None:
    found = [block for section in report.sections for block in section.blocks if isinstance(block, Figure)]
    assert len(found) == 13
    for one in found:
        json.dumps(one.spec, allow_nan=False)
        assert one.table.rows
        assert all(len(row) == len(one.table.head) for row in one.table.rows)
        assert one.alt
        assert one.how


def test_zero_has_no_place_on_a_log_axis(report: ReportPage) -> None:
    found = spec(figure(report, "Size against KL divergence"))
    ys = [y for trace in found["data"] for y in trace["y"]]
    assert None in ys
    assert all(y is None or y > 0 for y in ys)


def test_checkpoints_come_in_colours_and_symbols_of_their_own() -> None:
    assert len({(figures.color(n), figures.symbol(n)) for n in range(40)}) == 40


def test_names_are_shown_and_not_read_as_markup(tmp_path: Path) -> None:
    candidates = {"x/<b>bold<b>": (10, 0.1), "x/<a href='x'>b": (20, 0.2)}
    found = report_of(scored_checkpoints(read_documents([written(tmp_path, evaluation(candidates), "e.json")])))
    shown = json.dumps(spec(figure(found, "KL divergence by domain")))
    assert "&lt;" in shown
    assert "<b>" not in shown
    assert "<a" not in shown


def test_the_map_of_errors_has_gaps_where_there_is_no_linear() -> None:
    grid = error_grid(ConversionDocument.model_validate(conversion()))
    (trace,) = cast("Any", heat_maps.errors(grid))["data"]
    assert trace["z"][0][-1] is None
    assert trace["z"][2][0] == pytest.approx(math.log10(3e-5))
    assert "(expert 3) of 4" in trace["text"][2][-1]


def test_unseen_experts_are_crosses_and_not_zeros() -> None:
    grid = expert_grid(ConversionDocument.model_validate(conversion()))
    assert grid is not None
    heat, crosses = cast("Any", heat_maps.tokens(grid))["data"]
    assert heat["z"][0][1] is None
    assert heat["customdata"][0][0][0] == grid.tokens[0][0]
    assert (crosses["x"], crosses["y"]) == ([1], [1])


def test_the_error_of_an_experts_tokens_has_gaps_where_there_are_none(report: ReportPage) -> None:
    found = figure(report, "Error of each expert's tokens")
    (trace,) = spec(found)["data"]
    assert trace["y"] == [1, 2]
    assert trace["z"][0] == [pytest.approx(-1), None, pytest.approx(math.log10(0.2))]
    assert found.table.rows[0] == ("1", "10.0 %", "15.0 %", "20.0 %", "2")


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([7554, 9736], ["8,000", "8,500", "9,000", "9,500"]),
        ([1, 100], ["1", "3", "10", "30", "100"]),
        ([10, 60], ["10", "20", "50"]),
        ([3, 2e6], ["100", "10,000", "1,000,000"]),
        ([5], ["5"]),
        ([0, 1e-310, 5, math.inf, math.nan], ["5"]),
        ([math.inf], None),
        ([], None),
    ],
)
def test_ticks_of_a_log_scale_are_few_and_round(values: list[float], labels: list[str] | None) -> None:
    ticks = cast("Any", heat_maps.log_ticks(values, percent=False))
    assert ticks.get("ticktext") == labels


def test_values_that_hardly_differ_have_few_ticks() -> None:
    """And not a list of ten thousand million, down to zero."""
    ticks = cast("Any", heat_maps.log_ticks([10**10, 10**10 + 1], percent=False))
    assert 2 <= len(ticks["tickvals"]) <= 5
    assert len(cast("Any", heat_maps.log_ticks([0.1, 0.1 + 1e-16], percent=True))["tickvals"]) <= 5


def test_values_within_a_power_of_ten_have_ticks(tmp_path: Path) -> None:
    path = written(tmp_path, evaluation({"a": (100, 0.0145), "b": (60, 0.0181)}, floor=None), "e.json")
    axis = spec(figure(report_of(scored_checkpoints(read_documents([path]))), "Size against KL divergence"))["layout"][
        "yaxis"
    ]
    assert [
        label for tick, label in zip(axis["tickvals"], axis["ticktext"], strict=True) if 0.0145 < tick < 0.0181
    ] == [
        "0.016",
        "0.018",
    ]


def test_a_noise_floor_beyond_all_measure_is_not_drawn(tmp_path: Path) -> None:
    path = written(tmp_path, evaluation({"a": (100, 0.01), "b": (60, 0.5)}, floor=math.inf), "e.json")
    layout = spec(figure(report_of(scored_checkpoints(read_documents([path]))), "Size against KL divergence"))["layout"]
    assert "shapes" not in layout


def test_names_of_points_avoid_each_other(tmp_path: Path) -> None:
    candidates = {"int4": (100, 0.010), "int4-rtn": (100, 0.012), "int8": (200, 0.001), "int3": (60, 0.5)}
    found = report_of(scored_checkpoints(read_documents([written(tmp_path, evaluation(candidates), "e.json")])))
    traces = spec(figure(found, "Size against KL divergence"))["data"][1:]
    places = {name: place for trace in traces for name, place in zip(trace["text"], trace["textposition"], strict=True)}
    assert places["int4"] != places["int4-rtn"]
