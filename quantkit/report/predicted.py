"""What a choice of types expected of a checkpoint beside what was measured, and what it expected of other sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from quantkit.documents.conversion import ConversionDocument
from quantkit.report import figures, numbers
from quantkit.report.contents import Block, Figure, Note, Spec, Table
from quantkit.report.quality import kld_text
from quantkit.report.scored import Score, ScoredCheckpoint

HEAD = ("checkpoint", "expected mean KLD", "measured", "measured / expected")
HEIGHT = 430

_Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A checkpoint whose types were chosen. ``expected``: mean KLD, nats per token; ``curve``: (bytes, expected) of
    other sizes."""

    checkpoint: ScoredCheckpoint
    score: Score
    expected: float
    curve: _Curve

    @property
    def label(self) -> str:
        return self.checkpoint.label


def predicted(checkpoints: Sequence[ScoredCheckpoint]) -> Iterator[Block]:
    """Plots of the checkpoints whose types were chosen for a size, nothing if there are none."""
    found = [chosen for checkpoint in checkpoints if (chosen := _chosen(checkpoint)) is not None]
    if not found:
        return
    yield Note("Types of these checkpoints were chosen for a size, by what they were expected to lose.")
    yield _comparison(found)
    if any(one.curve for one in found):
        yield _sizes([one for one in found if one.curve])


def _chosen(checkpoint: ScoredCheckpoint) -> _Chosen | None:
    if checkpoint.conversion is None or checkpoint.score is None:
        return None
    output = _output(checkpoint.conversion.document)
    expected = output.get("predicted_kl")
    if not isinstance(expected, float) or not 0 < expected < math.inf:
        return None
    return _Chosen(checkpoint, checkpoint.score, expected, _curve(output.get("predicted_curve")))


def _output(document: ConversionDocument) -> Mapping[str, object]:
    """The output in the recipe; of any other origin, nothing."""
    outputs = document.recipe.get("outputs")
    for output in cast("list[object]", outputs) if isinstance(outputs, list) else []:
        if isinstance(output, dict) and cast("dict[str, object]", output).get("name") == document.output:
            return cast("dict[str, object]", output)
    return {}


def _curve(value: object) -> _Curve:
    """Points that are some."""
    points: list[tuple[int, float]] = []
    for point in cast("list[object]", value) if isinstance(value, list) else []:
        match point:
            case [int(nbytes), float(kl)] if 0 < nbytes < 2**63 and 0 < kl < math.inf:
                points.append((nbytes, kl))
            case _:
                pass
    return tuple(points)


def _comparison(found: Sequence[_Chosen]) -> Figure:
    rows = tuple(
        (one.label, f"{one.expected:.2g}", kld_text(one.score), f"{one.score.kld.mean / one.expected:.2f}")
        for one in found
    )
    return Figure(
        title="Expected and measured KL divergence",
        how="On the line both are equal; above it the checkpoint lost more than was expected of its types. Bars are "
        "one standard error.",
        alt=f"Scatter plot of {numbers.counted(len(found), 'checkpoint')}, expected against measured mean KL "
        "divergence.",
        spec=_comparison_spec(found),
        table=Table(HEAD, rows),
    )


def _comparison_spec(found: Sequence[_Chosen]) -> Spec:
    values = [value for one in found for value in (one.expected, one.score.kld.mean) if 0 < value < math.inf]
    ends = [min(values) / 1.5, max(values) * 1.5]
    axis = {**figures.log_axis(ends), "range": [math.log10(end) for end in ends]}
    data: list[object] = [_line(ends, ends, "$muted", "dot")]
    data += [_points(one, one.expected, number) for number, one in enumerate(found)]
    layout = {
        "height": HEIGHT,
        "xaxis": {**axis, "title": {"text": "expected mean KLD, nats per token"}},
        "yaxis": {**axis, "title": {"text": "measured, nats per token"}},
    }
    return {"data": data, "layout": layout}


def _sizes(found: Sequence[_Chosen]) -> Figure:
    rows = tuple((one.label, numbers.size(size), f"{kl:.2g}") for one in found for size, kl in one.curve)
    return Figure(
        title="Expected KL divergence of other sizes",
        how="Each line is what the best choice of types was expected to lose at each size; the ring on it is the size "
        "that was taken, and the filled point with its bar of one standard error what was measured there.",
        alt=f"Line plot of size against expected mean KL divergence, for {numbers.counted(len(found), 'checkpoint')}.",
        spec=_sizes_spec(found),
        table=Table(("checkpoint", "tensor bytes", "expected mean KLD"), rows, long=True),
        summary=f"From {min(kl for one in found for _, kl in one.curve):.2g} to "
        f"{max(kl for one in found for _, kl in one.curve):.2g} nats.",
    )


def _sizes_spec(found: Sequence[_Chosen]) -> Spec:
    unit, name = (1e9, "GB") if max(one.checkpoint.nbytes for one in found) >= 1e9 else (1e6, "MB")
    data: list[object] = []
    for number, one in enumerate(found):
        at = one.checkpoint.nbytes / unit
        data.append(_line([size / unit for size, _ in one.curve], [kl for _, kl in one.curve], figures.color(number)))
        ring = {"y": [one.expected], "error_y": {}, "marker": _marker(number, hollow=True), "showlegend": False}
        data += [{**_points(one, at, number), **ring}, _points(one, at, number)]
    values = [kl for one in found for kl in (*(kl for _, kl in one.curve), one.score.kld.mean)]
    layout = {
        "height": HEIGHT,
        "xaxis": {"title": {"text": f"size in {name}"}},
        "yaxis": {**figures.log_axis(values), "title": {"text": "mean KLD, nats per token"}},
    }
    return {"data": data, "layout": layout}


def _line(x: Sequence[float], y: Sequence[float], color: str, dash: str = "solid") -> Mapping[str, object]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": figures.log_safe(y),
        "line": {"color": color, "width": 2, "dash": dash},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _points(one: _Chosen, x: float, number: int) -> dict[str, object]:
    """What was measured, at ``x``."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": figures.text(one.label),
        "x": [x],
        "y": figures.log_safe([one.score.kld.mean]),
        "error_y": {"type": "data", "array": figures.finite([one.score.kld.standard_error]), "thickness": 1.2},
        "marker": _marker(number, hollow=False),
        "hovertemplate": f"<b>{figures.text(one.label)}</b><br>%{{y:.3g}} nats<extra></extra>",
    }


def _marker(number: int, *, hollow: bool) -> Mapping[str, object]:
    symbol = figures.symbol(number)
    return {"size": 11, "color": figures.color(number), "symbol": f"{symbol}-open" if hollow else symbol}
