"""Checkpoints -> the plot of size against mean KLD: a range that fits the points, names that do not cover each other.

Where a name stands depends on the plot's width in pixels, so it is decided twice: for a desktop, and for a phone, whose
choice the page's script takes from the trace's ``meta``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantkit.documents.values import Mean
from quantkit.report import figures, numbers
from quantkit.report.contents import Spec
from quantkit.report.scored import ScoredCheckpoint

HEIGHT = 430
BETWEEN = 1.0
"""Powers of ten below the lowest point down to which a noise floor is still drawn as a line."""


@dataclass(frozen=True, slots=True)
class Room:
    """Pixels that the axes span, and those of a letter of a name."""

    width: float
    height: float
    letter: float


DESKTOP, PHONE = Room(620, 330, 7.2), Room(240, 330, 6.1)
_PLACES = (
    ("top right", 1, 1),
    ("bottom left", -1, -1),
    ("top center", 0, 1),
    ("bottom center", 0, -1),
    ("middle right", 1, 0),
    ("middle left", -1, 0),
    ("top left", -1, 1),
    ("bottom right", 1, -1),
)
"""plotly's words, and the direction from the point. The first two are off a line that falls from left to right."""

Box = tuple[float, float, float, float]
"""left, right, bottom, top in pixels."""


@dataclass(frozen=True, slots=True)
class _Point:
    """A checkpoint on the axes: size in the plot's unit, KLD."""

    checkpoint: ScoredCheckpoint
    x: float
    kld: Mean

    @property
    def spread(self) -> tuple[float, float]:
        """The ends of its error bar, as logarithms; both the point itself where there is none."""
        error = self.kld.standard_error
        ends = (self.kld.mean - error, self.kld.mean + error) if math.isfinite(error) else ()
        inside = [value for value in (self.kld.mean, *ends) if 0 < value < math.inf]
        return math.log10(min(inside)), math.log10(max(inside))


def pareto(checkpoints: Sequence[ScoredCheckpoint], best: Sequence[ScoredCheckpoint], floor: float | None) -> Spec:
    """Size against mean KLD with its standard error; the line joins ``best``, smallest first. ``floor``: KLD of the
    noise floor."""
    unit, name = (1e9, "GB") if max(one.nbytes for one in checkpoints) >= 1e9 else (1e6, "MB")
    points = [_Point(one, one.nbytes / unit, one.score.kld) for one in checkpoints if one.score is not None]
    drawn = [point for point in points if 0 < point.kld.mean < math.inf]
    x_range, y_range = _x_range(points), _y_range(drawn, floor)
    line = [point for one in best for point in points if point.checkpoint is one]
    layout: dict[str, object] = {
        "height": HEIGHT,
        "showlegend": False,
        "xaxis": {"title": {"text": f"size in {name}"}, "range": x_range},
        "yaxis": {
            **figures.log_axis(10.0**end for end in y_range),
            "title": {"text": "mean KLD, nats per token"},
            "range": y_range,
        },
    }
    if floor is not None and 0 < floor < math.inf:
        layout |= _floor(floor, y_range)
    desktop, phone = (_label_places(drawn, x_range, y_range, room) for room in (DESKTOP, PHONE))
    data: list[object] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [point.x for point in line],
            "y": figures.log_safe(point.kld.mean for point in line),
            "line": {"color": "$c0", "width": 2, "shape": "linear"},
            "hoverinfo": "skip",
        },
        *(
            _trace(chosen, desktop, phone, name, on_front=on_front)
            for on_front in (True, False)
            if (chosen := [point for point in points if (point.checkpoint in best) == on_front])
        ),
    ]
    return {"data": data, "layout": layout}


def _trace(
    points: Sequence[_Point], desktop: Mapping[int, str], phone: Mapping[int, str], unit: str, *, on_front: bool
) -> Mapping[str, object]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [point.x for point in points],
        "y": figures.log_safe(point.kld.mean for point in points),
        "error_y": {
            "type": "data",
            "array": figures.finite(point.kld.standard_error for point in points),
            "thickness": 1.2,
        },
        **_names(points, desktop),
        "meta": {"narrow": _names(points, phone)},
        "cliponaxis": False,
        "marker": {
            "size": 11,
            "color": "$c0" if on_front else "$muted",
            "symbol": "circle" if on_front else "circle-open",
        },
        "customdata": [
            [numbers.estimate(point.kld), f"{point.checkpoint.bpw:.3f}", figures.text(point.checkpoint.label)]
            for point in points
        ],
        "hovertemplate": f"<b>%{{customdata[2]}}</b><br>%{{x:.2f}} {unit}, %{{customdata[1]}} bits per weight"
        "<br>KLD %{customdata[0]}<extra></extra>",
    }


def _names(points: Sequence[_Point], places: Mapping[int, str]) -> dict[str, object]:
    """The names that have a place, and where."""
    placed = [places.get(id(point.checkpoint)) for point in points]
    return {
        "text": [
            figures.text(point.checkpoint.label) if place else "" for point, place in zip(points, placed, strict=True)
        ],
        "textposition": [place or "top center" for place in placed],
    }


def _x_range(points: Sequence[_Point]) -> tuple[float, float]:
    """Room for the names beside the outermost points."""
    low, high = min(point.x for point in points), max(point.x for point in points)
    room = 0.15 * (high - low) or 0.1 * high or 1.0
    return max(0.0, low - room), high + room


def _y_range(points: Sequence[_Point], floor: float | None) -> tuple[float, float]:
    """Logarithms of the least and the largest KLD that are shown: the points with their error bars, and the noise floor
    if it is not far below them."""
    ends = [end for point in points for end in point.spread] or [-2.0]
    low, high = min(ends), max(ends)
    if floor is not None and low - BETWEEN < math.log10(floor if 0 < floor < math.inf else 1e-300) < low:
        low = math.log10(floor)
    room = max(0.08, 0.12 * (high - low))
    return low - room, high + room


def _floor(floor: float, y_range: tuple[float, float]) -> Mapping[str, object]:
    """The noise floor as a line, or a remark at the end of the axis that it lies beyond."""
    level = math.log10(floor)
    place = {"xref": "paper", "x": 1, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    label = {**place, "font": {"color": "$muted", "size": 12}}
    if not y_range[0] <= level <= y_range[1]:
        where = "below" if level < y_range[0] else "above"
        remark = f"noise floor: {numbers.number(floor, 2)}, {where} the plot"
        return {"annotations": [{**label, "yref": "paper", "y": 0, "text": remark}]}
    stroke = {"color": "$muted", "dash": "dot", "width": 1.5}
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": floor, "y1": floor, "line": stroke}
    return {"shapes": [line], "annotations": [{**label, "y": level, "text": "noise floor"}]}


# --------------------------------------------------------------------------------------------------------------- names


def _label_places(
    points: Sequence[_Point], x_range: tuple[float, float], y_range: tuple[float, float], room: Room
) -> dict[int, str]:
    """Where the name of each checkpoint (by id) stands. One that would cover another, a point or an error bar, or stick
    out, has no place: pointing at it, and the table, tell it."""

    def across(x: float) -> float:
        return room.width * (x - x_range[0]) / (x_range[1] - x_range[0])

    def up(logarithm: float) -> float:
        return room.height * (logarithm - y_range[0]) / (y_range[1] - y_range[0])

    centres = [(across(point.x), up(math.log10(point.kld.mean))) for point in points]
    taken = [(x - 7, x + 7, y - 7, y + 7) for x, y in centres]
    taken += [
        (x - 4, x + 4, up(point.spread[0]), up(point.spread[1])) for point, (x, _) in zip(points, centres, strict=True)
    ]
    places: dict[int, str] = {}
    for point, centre in sorted(zip(points, centres, strict=True), key=lambda item: item[1]):
        width = room.letter * len(point.checkpoint.label)
        boxes = {name: _box(centre, width, right, above) for name, right, above in _PLACES}
        free = (name for name, box in boxes.items() if _inside(box, room) and not any(_overlap(box, t) for t in taken))
        place = next(free, None)
        if place is not None:
            taken.append(boxes[place])
            places[id(point.checkpoint)] = place
    return places


def _box(centre: tuple[float, float], width: float, right: int, above: int) -> Box:
    """Where plotly writes a name of ``width`` pixels, 16 high, in a direction from a point's centre."""
    x, y = centre
    beside = 9 if above == 0 else 4
    middle = x + right * (width / 2 + beside)
    return middle - width / 2, middle + width / 2, y + 16 * above - 8, y + 16 * above + 8


def _inside(box: Box, room: Room) -> bool:
    return box[0] >= 0 and box[1] <= room.width and box[2] >= 0 and box[3] <= room.height


def _overlap(one: Box, other: Iterable[float]) -> bool:
    left, right, bottom, top = other
    return one[0] < right and left < one[1] and one[2] < top and bottom < one[3]
