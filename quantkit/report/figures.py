"""Numbers -> plotly figures. Log axes where values span powers of ten; colours by name, so that a page can change its
theme."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from quantkit.documents.conversion import StoredRole
from quantkit.documents.values import Mean
from quantkit.report import numbers
from quantkit.report.contents import Spec

PALETTE = 8
"""Colours $c0 to $c7 of report.js; with as many symbols, so that no two series look the same."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon")
FEW = 16
"""Layers or experts that have room for a tick each."""

_POWERS = range(-9, 5)
_LOG: Mapping[str, object] = {
    "type": "log",
    "tickvals": [10.0**power for power in _POWERS],
    "ticktext": [
        f"{10.0**power:g}" if power > -4 else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        for power in _POWERS
    ],
}


_FINER = ((3.0, (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)), (30.0, (1, 2, 3, 5, 7)), (300.0, (1, 2, 5)))
"""Ticks within a power of ten, if the largest value is less than so many times the least."""


def log_axis(values: Iterable[float]) -> Mapping[str, object]:
    """A log axis with more ticks than powers of ten if values lie so near to each other that it would have none."""
    known = [value for value in values if 1e-12 < value < 1e12]
    steps = next((steps for ratio, steps in _FINER if known and max(known) < ratio * min(known)), None)
    if steps is None:
        return _LOG
    powers = range(math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known))) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.6g}" for tick in ticks]}


def text(value: str) -> str:
    """A text that plotly shows as it is: it takes some HTML in texts."""
    return html.escape(value, quote=False)


def color(number: int) -> str:
    """Colour of a series, by its number."""
    return f"$c{number % PALETTE}"


def symbol(number: int) -> str:
    """Symbol of a series, by its number: when colours repeat it is another one."""
    return SYMBOLS[(number + number // PALETTE) % len(SYMBOLS)]


def finite(values: Iterable[float]) -> list[float | None]:
    """None for what JSON cannot say."""
    return [value if math.isfinite(value) else None for value in values]


def log_safe(values: Iterable[float]) -> list[float | None]:
    """Log axes have no place for zero."""
    return [value if math.isfinite(value) and value > 0 else None for value in values]


def tail(series: Sequence[tuple[str, Sequence[tuple[float, float]], bool]]) -> Spec:
    """Share of tokens whose KLD is larger. ``series``: (name, (KLD, share) by falling share, whether it is the noise
    floor)."""
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(points) > 8 else "lines+markers",
            "name": text(name),
            "x": log_safe(kld for kld, _ in points),
            "y": log_safe(100 * share for _, share in points),
            "line": {"color": "$muted" if floor else color(number), "dash": "dot" if floor else "solid", "width": 2},
            "marker": {"symbol": symbol(number), "size": 8},
            "hovertemplate": "%{y:.3g} % of tokens above %{x:.3g} nats",
        }
        for number, (name, points, floor) in enumerate(series)
    ]
    layout = {
        "height": 400,
        "hovermode": "closest",
        "xaxis": {**_LOG, "title": {"text": "KLD of a token, nats"}},
        "yaxis": {**_LOG, "title": {"text": "tokens with more, %"}},
    }
    return {"data": data, "layout": layout}


def domains(names: Sequence[str], series: Sequence[tuple[str, Sequence[Mean | None], bool]]) -> Spec:
    """Mean KLD with its standard error for each domain: a row of points. None: not measured there."""
    labels = [text(name) for name in names]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": text(name),
            "y": labels,
            "x": log_safe(math.nan if mean is None else mean.mean for mean in means),
            "error_x": {
                "type": "data",
                "array": finite(math.nan if mean is None else mean.standard_error for mean in means),
                "thickness": 1.2,
            },
            "marker": {"color": "$muted" if floor else color(number), "symbol": symbol(number), "size": 10},
            "customdata": ["" if mean is None else numbers.estimate(mean) for mean in means],
            "hovertemplate": "%{y}: %{customdata} nats",
        }
        for number, (name, means, floor) in enumerate(series)
    ]
    layout = {
        "height": 150 + 34 * len(names),
        "hovermode": "closest",
        "xaxis": {
            **log_axis(m.mean for _, means, _ in series for m in means if m is not None),
            "title": {"text": "mean KLD, nats per token"},
        },
        "yaxis": {"type": "category", "autorange": "reversed"},
    }
    return {"data": data, "layout": layout}


def by_layer(series: Sequence[tuple[str, Sequence[tuple[int, float]], bool]], title: str, *, log: bool) -> Spec:
    """A line for each checkpoint over the decoder layers."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(points) < 30 else "lines",
            "name": text(name),
            "x": [layer for layer, _ in points],
            "y": (log_safe if log else finite)(value for _, value in points),
            "line": {"color": "$muted" if floor else color(number), "dash": "dot" if floor else "solid", "width": 2},
            "marker": {"symbol": symbol(number), "size": 7},
            "hovertemplate": "layer %{x}: %{y:.3g} %",
        }
        for number, (name, points, floor) in enumerate(series)
    ]
    layers = sorted({layer for _, points, _ in series for layer, _ in points})
    scale = log_axis(value for _, points, _ in series for _, value in points) if log else {}
    layout = {
        "height": 330,
        "hovermode": "closest",
        "xaxis": {"title": {"text": "layer"}, **whole(layers)},
        "yaxis": {**scale, "title": {"text": title}},
    }
    return {"data": data, "layout": layout}


def whole(values: Sequence[int]) -> Mapping[str, object]:
    """Ticks at whole numbers, all of them if they are few."""
    if len(values) <= FEW:
        return {"tickvals": list(values)}
    return {"tickformat": "d"}


def sizes(rows: Sequence[StoredRole]) -> Spec:
    """A bar for each role and way of storing, largest first."""
    total = sum(row.nbytes for row in rows) or 1
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    most = max((row.nbytes for row in rows), default=0) / unit
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [f"{text(row.role)}<br><span style='font-size:0.8em'>{text(row.stored_as)}</span>" for row in rows],
            "x": [row.nbytes / unit for row in rows],
            "text": [f"{numbers.size(row.nbytes)} · {_bpw(row):.4g} bpw" for row in rows],
            "textposition": ["inside" if 2 * row.nbytes > rows[0].nbytes else "outside" for row in rows],
            "textangle": 0,
            "insidetextfont": {"color": "$surface"},
            "cliponaxis": False,
            "marker": {"color": "$c0"},
            "customdata": [[f"{row.parameters:,}", f"{row.tensors:,}", f"{row.nbytes / total:.1%}"] for row in rows],
            "hovertemplate": "%{y}<br>%{customdata[0]} weights in %{customdata[1]} tensors,"
            " %{customdata[2]} of the bytes<extra></extra>",
        }
    ]
    layout = {
        "height": 110 + 44 * len(rows),
        "showlegend": False,
        "xaxis": {"title": {"text": name}, "range": [0, 1.08 * most or 1], "nticks": 6},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
        "bargap": 0.35,
    }
    return {"data": data, "layout": layout}


def _bpw(row: StoredRole) -> float:
    return 8 * row.nbytes / row.parameters if row.parameters else 0.0


def sizes_compared(checkpoints: Sequence[tuple[str, Mapping[str, int]]]) -> Spec:
    """A stacked bar for each checkpoint: bytes by role."""
    roles = list(dict.fromkeys(role for _, parts in checkpoints for role in parts))
    unit, name = (1e9, "GB") if max(sum(parts.values()) for _, parts in checkpoints) >= 1e9 else (1e6, "MB")
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": text(role),
            "y": [text(label) for label, _ in checkpoints],
            "x": [parts.get(role, 0) / unit for _, parts in checkpoints],
            "marker": {"color": color(number), "line": {"color": "$surface", "width": 1}},
            "hovertemplate": f"%{{y}}: %{{x:.3g}} {name}",
        }
        for number, role in enumerate(roles)
    ]
    layout = {
        "height": 190 + 36 * len(checkpoints),
        "barmode": "stack",
        "legend": {"traceorder": "normal"},
        "hovermode": "closest",
        "xaxis": {"title": {"text": name}},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
        "bargap": 0.35,
    }
    return {"data": data, "layout": layout}
