"""Figures are JSON that plotly takes, and say what the numbers say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest

from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.read import read_documents
from quantkit.report import figures, heat_maps, pareto
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


CROWDED = {
    "int4-g128-all": (340_000, 0.0301),
    "llm-compressor-W4A16": (340_000, 0.0397),
    "auto-round-W4A16": (340_000, 0.0334),
    "int4-g128-experts": (356_000, 0.0156),
    "IQ4_XS": (357_000, 0.0192),
    "Q4_K_M": (404_000, 0.0155),
    "llama-quantize-Q4_K_M": (404_000, 0.0235),
    "rtn": (265_000, 0.42),
}


def plotted(tmp_path: Path, candidates: dict[str, tuple[int, float]], floor: float | None = 1e-5) -> Any:
    path = written(tmp_path, evaluation(candidates, floor=floor), "e.json")
    return spec(figure(report_of(scored_checkpoints(read_documents([path]))), "Size against KL divergence"))


def boxes(found: Any, room: pareto.Room, names: str) -> list[tuple[str, tuple[float, float, float, float]]]:
    """What is drawn of each name, by plotly's rules: (name, (left, right, bottom, top) in pixels)."""
    (x0, x1), (y0, y1) = found["layout"]["xaxis"]["range"], found["layout"]["yaxis"]["range"]
    drawn: list[tuple[str, tuple[float, float, float, float]]] = []
    for trace in found["data"][1:]:
        shown = trace if names == "desktop" else trace["meta"]["narrow"]
        for x, y, name, place in zip(trace["x"], trace["y"], shown["text"], shown["textposition"], strict=True):
            above, beside = place.split()
            middle = room.width * (x - x0) / (x1 - x0), room.height * (math.log10(y) - y0) / (y1 - y0)
            width = room.letter * len(name)
            left = middle[0] + {"center": -width / 2, "right": 4, "left": -width - 4}[beside]
            bottom = middle[1] + {"top": 8, "middle": -8, "bottom": -24}[above]
            if name:
                drawn.append((name, (left, left + width, bottom, bottom + 16)))
    return drawn


@pytest.mark.parametrize(("names", "room"), [("desktop", pareto.DESKTOP), ("phone", pareto.PHONE)])
def test_names_of_points_cover_nothing_at_either_width(tmp_path: Path, names: str, room: pareto.Room) -> None:
    drawn = boxes(plotted(tmp_path, CROWDED), room, names)
    assert len(drawn) >= (6 if names == "desktop" else 4)
    for number, (name, one) in enumerate(drawn):
        assert one[0] >= 0, name
        assert one[1] <= room.width, name
        for other_name, other in drawn[:number]:
            apart = one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
            assert apart, (name, other_name)


def test_the_range_of_the_plot_fits_its_points(tmp_path: Path) -> None:
    low, high = plotted(tmp_path, {"a": (100, 0.0145), "b": (60, 0.0181)})["layout"]["yaxis"]["range"]
    assert 0.010 < 10**low < 0.0145 - 0.00145
    assert 0.0181 + 0.00181 < 10**high < 0.025


def test_a_noise_floor_is_a_line_where_it_is_near_and_a_remark_where_it_is_not(tmp_path: Path) -> None:
    near = plotted(tmp_path / "near", {"a": (100, 0.01), "b": (60, 0.02)}, floor=0.002)["layout"]
    assert near["shapes"][0]["y0"] == 0.002
    assert 10 ** near["yaxis"]["range"][0] < 0.002
    far = plotted(tmp_path / "far", {"a": (100, 0.01), "b": (60, 0.02)}, floor=1e-6)["layout"]
    assert "shapes" not in far
    assert far["annotations"][0]["text"] == "noise floor: 0.0000010, below the plot"


def test_checkpoints_that_equal_the_original_have_a_plot(tmp_path: Path) -> None:
    found = plotted(tmp_path, {"a": (100, 0.0), "b": (60, 0.0)}, floor=None)
    assert all(y is None for trace in found["data"] for y in trace["y"])


def test_what_stands_out_in_a_map_is_what_to_look_at() -> None:
    """Large errors and few tokens, in the same colours."""
    document = ConversionDocument.model_validate(conversion())
    grid = expert_grid(document)
    assert grid is not None
    assert cast("Any", heat_maps.tokens(grid))["data"][0]["colorscale"] == "$scarce"
    assert cast("Any", heat_maps.errors(error_grid(document)))["data"][0]["colorscale"] == "$heat"
