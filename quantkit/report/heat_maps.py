"""Grids of layers -> plotly heat maps, on log scales that the colour-blind can read (viridis).

In all of them what stands out from the page is what to look at: a large error ("$heat"), few tokens ("$scarce").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quantkit.report import figures, numbers
from quantkit.report.contents import Spec
from quantkit.report.linears import Cell, ErrorGrid, ExpertErrors, ExpertGrid


def errors(grid: ErrorGrid) -> Spec:
    """Median relative loss of each projection in each layer, on a log scale."""
    cells = [[grid.cells.get((layer, projection)) for projection in grid.projections] for layer in grid.layers]
    known = [cell.median for row in cells for cell in row if cell is not None]
    data = [
        {
            "type": "heatmap",
            "x": [figures.text(projection) for projection in grid.projections],
            "y": list(grid.layers),
            "z": [[None if cell is None else _log(cell.median) for cell in row] for row in cells],
            "text": [["" if cell is None else _hover_text(cell) for cell in row] for row in cells],
            "hoverongaps": False,
            "hovertemplate": "layer %{y}, %{x}<br>%{text}<extra></extra>",
            "xgap": 1,
            "ygap": 1,
            "colorscale": "$heat",
            "colorbar": {**log_ticks(known, percent=True), "title": {"text": "loss"}},
        }
    ]
    return {
        "data": data,
        "layout": _map_layout(
            grid.layers, {"type": "category", "tickangle": -60}, 12 if len(grid.layers) > figures.FEW else 30, 210
        ),
    }


def _hover_text(cell: Cell) -> str:
    """The text of a cell of the map of errors when the pointer is on it."""
    median = f"{figures.text(cell.stored_as)}<br>median {numbers.percentage(cell.median)}"
    if cell.count == 1:
        return median
    largest = "" if cell.largest_expert is None else f" (expert {cell.largest_expert})"
    return (
        f"{median}, 90 % below {numbers.percentage(cell.p90)}"
        f"<br>largest {numbers.percentage(cell.largest)}{largest} of {cell.count}"
    )


def tokens(grid: ExpertGrid) -> Spec:
    """Tokens of each expert of each layer, on a log scale; few stand out. Unseen experts are crosses."""
    means = [sum(row) / len(row) if row else 0 for row in grid.tokens]
    seen = [count for count in grid.counts if count]
    width = max(len(row) for row in grid.tokens)
    padded = [row + (0,) * (width - len(row)) for row in grid.tokens]
    experts, expert = _expert_axis(width)
    data: list[object] = [
        {
            **_expert_cells(width, grid.layers),
            "colorscale": "$scarce",
            "z": [[_log(count) for count in row] for row in padded],
            "customdata": [
                [[count, round(count / mean, 2) if mean else 0] for count in row]
                for row, mean in zip(padded, means, strict=True)
            ],
            "hovertemplate": f"{expert}<br><b>%{{customdata[0]:,d}} tokens</b>"
            "<br>%{customdata[1]} × the layer's mean<extra></extra>",
            "colorbar": {**log_ticks(seen, percent=False), "title": {"text": "tokens"}},
        }
    ]
    if len(seen) < len(grid.counts):
        data.append(_crosses(grid, expert))
    return {"data": data, "layout": _expert_layout(grid.layers, experts)}


def expert_errors(layers: Sequence[ExpertErrors]) -> Spec:
    """Error of the hidden state over the tokens of each expert. An expert without tokens is a gap."""
    width = max(len(layer.errors) for layer in layers)
    experts, expert = _expert_axis(width)
    known = [error for layer in layers for error in layer.errors]
    data = [
        {
            **_expert_cells(width, [layer.layer for layer in layers]),
            "z": [[_log(error) for error in layer.errors] for layer in layers],
            "customdata": [
                [[numbers.percentage(error), count] for error, count in zip(layer.errors, layer.tokens, strict=True)]
                for layer in layers
            ],
            "hovertemplate": f"{expert}<br><b>%{{customdata[0]}}</b> over %{{customdata[1]:,d}} tokens<extra></extra>",
            "colorbar": {**log_ticks(known, percent=True), "title": {"text": "error"}},
        }
    ]
    return {"data": data, "layout": _expert_layout([layer.layer for layer in layers], experts)}


def _expert_axis(width: int) -> tuple[Mapping[str, object], str]:
    """The axis of experts, and how hovering says where one is: plotly puts the prefix of ticks before each value."""
    if width <= figures.FEW:
        return {"tickvals": list(range(width))}, "layer %{y}, expert %{x}"
    return {"tickprefix": "expert ", "showtickprefix": "first", "tickformat": "d"}, "layer %{y}, %{x}"


def _expert_cells(width: int, layers: Sequence[int]) -> dict[str, object]:
    gap = 1 if width <= 64 else 0
    place = {"x": list(range(width)), "y": list(layers), "xgap": gap, "ygap": gap}
    return {"type": "heatmap", **place, "hoverongaps": False, "colorscale": "$heat"}


def _expert_layout(layers: Sequence[int], experts: Mapping[str, object]) -> Mapping[str, object]:
    return _map_layout(layers, experts, 10 if len(layers) > figures.FEW else 30, 170)


def _crosses(grid: ExpertGrid, expert: str) -> dict[str, object]:
    """Markers of unseen experts: a cell may be three pixels wide, and not everybody sees red."""
    unseen = [
        (x, layer) for row, layer in zip(grid.tokens, grid.layers, strict=True) for x, n in enumerate(row) if not n
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, _ in unseen],
        "y": [layer for _, layer in unseen],
        "marker": {"symbol": "x", "size": 9, "color": "$bad", "line": {"color": "$surface", "width": 1}},
        "hovertemplate": f"{expert}<br><b>no tokens</b><extra></extra>",
    }


def _map_layout(
    layers: Sequence[int], xaxis: Mapping[str, object], row_height: int, around: int
) -> Mapping[str, object]:
    """``around``: pixels for what is not rows."""
    return {
        "height": around + row_height * len(layers),
        "xaxis": {**xaxis, "showgrid": False},
        "showlegend": False,
        "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", "showgrid": False, **figures.whole(layers)},
    }


def _log(value: float) -> float | None:
    """None for what has no place on the scale."""
    return math.log10(value) if 0 < value < math.inf else None


def log_ticks(found: Sequence[float], *, percent: bool) -> Mapping[str, object]:
    """Two to five ticks of a colour bar whose values are logarithms."""
    values = [value for value in found if 1e-300 < value < 1e300]
    if not values:
        return {}
    low, high = math.log10(min(values)), math.log10(max(values))
    powers = range(math.floor(low) - 1, math.ceil(high) + 1)
    kept = sorted({min(values), max(values)})
    finer = [[step * 10.0**power for power in powers for step in steps] for steps in ((1, 2, 5), (1, 3))]
    coarser = [[10.0**power for power in powers if power % step == 0] for step in (1, 2, 3, 4)]
    # Less than a factor of two or three apart: steps of equal width, rounded.
    width = 10.0 ** math.floor(math.log10((max(values) - min(values)) or 1))
    even = [_multiples(width * step, min(values), max(values)) for step in (0.2, 0.5, 1, 2)]
    room = 0.02 * (high - low)
    for ticks in (*finer, *coarser, *even):
        inside = [tick for tick in ticks if tick > 0 and low - room <= math.log10(tick) <= high + room]
        if 3 <= len(inside) <= 5:
            kept = inside
            break
    labels = [f"{100 * tick:.3g} %" if percent else _count(tick) for tick in kept]
    return {"tickvals": [math.log10(tick) for tick in kept], "ticktext": labels}


def _multiples(step: float, low: float, high: float) -> list[float]:
    """Multiples of ``step`` from ``low`` to ``high``; none if they are many more than a scale has room for."""
    if not step or high / step > 2**53:
        return []
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * n for n in range(first, last + 1)] if last - first < 100 else []


def _count(value: float) -> str:
    """ "8,500", but "1.5" between two small counts."""
    return f"{value:,.0f}" if math.isclose(value, round(value)) else f"{value:.3g}"
