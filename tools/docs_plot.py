"""Writes docs/quality-light.svg and docs/quality-dark.svg: KLD against bits per weight, quantkit beside other tools.

Integers for vLLM on the left, from benchmarks/results/peers_tiny.json; GGUF on the right, from gguf_tiny.json.

    python tools/docs_plot.py            write
    python tools/docs_plot.py --check    exit 1 if a file is not up to date (a test does the same)

Of several settings of a tool the best is drawn. The same results give the same bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

WIDTH, HEIGHT = 860, 470
TOP, BOTTOM = 76, 412
PANELS = {False: (76, 446), True: (476, 846)}
"""Whether GGUF is in it -> left and right, pixels."""
TITLES = {False: "integers, for vLLM", True: "GGUF, for llama.cpp"}
BITS, KLD = (2.6, 5.0), (0.009, 0.6)
"""Ranges of the axes; KLD on a log scale."""
KLD_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SCHEMES = {"int3": "int3 g128", "int4": "int4 g128", "mixed": "int4 experts, int8 rest"}
THEMES = {
    "light": {
        **{"back": "#ffffff", "ink": "#1a2027", "muted": "#5b6673", "grid": "#e3e7ec"},
        **{"quantkit": "#0072b2", "llm-compressor": "#d55e00", "GPTQModel": "#7d5ba6", "AutoRound": "#008463"},
        **{"llama-quantize": "#b0568c", "round to nearest": "#6b7480"},
    },
    "dark": {
        **{"back": "#0d1117", "ink": "#e4e8ee", "muted": "#98a3b1", "grid": "#262d36"},
        **{"quantkit": "#56b4e9", "llm-compressor": "#f08c3a", "GPTQModel": "#b59adf", "AutoRound": "#33c29a"},
        **{"llama-quantize": "#e39ac4", "round to nearest": "#8d98a5"},
    },
}
TOOLS = {
    "RTN": "round to nearest",
    "llmcompressor": "llm-compressor",
    "gptqmodel": "GPTQModel",
    "autoround": "AutoRound",
}
"""As the results call them -> as they call themselves."""
RINGED = "GPTQModel"
"""Drawn so that what lies under it is seen: its points are llm-compressor's but for a hair."""


@dataclass(frozen=True)
class Point:
    """A checkpoint. ``error``: one standard error of the KLD."""

    scheme: str
    bits: float
    kld: float
    error: float


Line = tuple[str, bool, list[Point]]
"""A tool, whether its files are GGUF, its points by rising bits."""


def lines(results: Path = RESULTS) -> list[Line]:
    """All that is drawn: other tools first, so that quantkit's points lie on top."""
    found: list[Line] = []
    for file, is_gguf in (("peers_tiny", False), ("gguf_tiny", True)):
        rows = json.loads((results / f"{file}.json").read_text(encoding="utf-8"))["rows"]
        rows = [row for row in rows if not _is_variant(row)]
        names = dict.fromkeys(row["name"] for row in rows)
        found += [(TOOLS.get(name, name), is_gguf, _best([r for r in rows if r["name"] == name])) for name in names]
    return sorted(found, key=lambda line: line[0] == "quantkit")


def _is_variant(row: Mapping[str, Any]) -> bool:
    """quantkit's own other plans for the bytes of a mix, and the mix without GPTQ: not what others have."""
    return row["name"] == "quantkit" and row["settings"].split(",")[0].endswith(("-bytes", "-imatrix"))


def _best(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    best: dict[str, Point] = {}
    for row in sorted(rows, key=lambda row: row["kld"]):
        best.setdefault(row["scheme"], Point(row["scheme"], row["bpw"], row["kld"], row["kld_se"]))
    return sorted(best.values(), key=lambda point: point.bits)


# ------------------------------------------------------------------------------------------------------------- drawing


def x_of(bits: float, is_gguf: bool) -> float:
    """Pixels from the left."""
    left, right = PANELS[is_gguf]
    return left + (right - left) * (bits - BITS[0]) / (BITS[1] - BITS[0])


def y_of(kld: float) -> float:
    """Pixels from the top."""
    low, high = math.log(KLD[0]), math.log(KLD[1])
    return BOTTOM - (BOTTOM - TOP) * (math.log(kld) - low) / (high - low)


def picture(theme: str, found: Sequence[Line]) -> str:
    """The SVG of a theme."""
    colors = THEMES[theme]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="13" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
        "<title>KL divergence against bits per weight: quantkit and other tools</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{colors["back"]}"/>',
        *_axes(colors),
        *(part for line in found for part in _line(line, colors)),
        *_legend(found, colors),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _axes(colors: Mapping[str, str]) -> Iterator[str]:
    muted, grid = colors["muted"], colors["grid"]
    for is_gguf, (left, right) in PANELS.items():
        yield _text(left, TOP - 12, TITLES[is_gguf], colors["ink"], "start")
        for tick in KLD_TICKS:
            y = y_of(tick)
            yield f'<path d="M{left} {y:.1f}H{right}" stroke="{grid}"/>'
            if not is_gguf:
                yield _text(left - 8, y + 4.5, f"{tick:g}", muted, "end")
        for tick in (3, 3.5, 4, 4.5, 5):
            x = x_of(tick, is_gguf)
            yield f'<path d="M{x:.1f} {TOP}V{BOTTOM}" stroke="{grid}"/>'
            yield _text(x, BOTTOM + 19, f"{tick:g}", muted, "middle")
        yield _text((left + right) / 2, BOTTOM + 43, "bits per weight, scales included", muted, "middle")
    middle = (TOP + BOTTOM) / 2
    label = _text(20, middle, "mean KL divergence, nats per token (log scale)", muted, "middle")
    yield f'<g transform="rotate(-90 20 {middle:g})">{label}</g>'


def _line(line: Line, colors: Mapping[str, str]) -> Iterator[str]:
    """Points with error bars, a line through them; for quantkit the names of schemes, below where nothing else is."""
    tool, is_gguf, points = line
    color, own = colors[tool], tool == "quantkit"
    places = [(x_of(point.bits, is_gguf), y_of(point.kld)) for point in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    yield f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="{2.5 if own else 1.4}"{_dash(tool)}/>'
    for point, (x, y) in zip(points, places, strict=True):
        low, high = y_of(point.kld - point.error), y_of(point.kld + point.error)
        yield f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{color}"/>'
        yield _mark(x, y, tool, color)
        if own:
            yield _text(x - 8, y + 16, SCHEMES.get(point.scheme, point.scheme), colors["ink"], "end")


def _dash(tool: str) -> str:
    return ' stroke-dasharray="6 4"' if tool == RINGED else ""


def _mark(x: float, y: float, tool: str, color: str) -> str:
    if tool == RINGED:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{color}" stroke-width="1.6"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5.5 if tool == "quantkit" else 4}" fill="{color}"/>'


def _legend(found: Sequence[Line], colors: Mapping[str, str]) -> Iterator[str]:
    """Tools in a row above the plots, quantkit first."""
    x = 76
    for tool in sorted({tool for tool, _, _ in found}, key=lambda tool: (tool != "quantkit", tool.lower())):
        width = 4 if tool == "quantkit" else 2
        yield f'<path d="M{x} 22h18" stroke="{colors[tool]}" stroke-width="{width}"{_dash(tool)}/>'
        yield _mark(x + 9, 22, tool, colors[tool])
        weight = ' font-weight="600"' if tool == "quantkit" else ""
        yield _text(x + 24, 26.5, tool, colors["ink"], "start", weight)
        x += 50 + round(6.9 * len(tool))


def _text(x: float, y: float, text: str, color: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}"{more}>{text}</text>'


def files(results: Path = RESULTS) -> dict[Path, str]:
    """Each picture's file with what it should hold."""
    found = lines(results)
    return {ROOT / "docs" / f"quality-{theme}.svg": picture(theme, found) for theme in THEMES}


def outdated() -> list[Path]:
    """The files that do not hold what the results say now."""
    return [path for path, text in files().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    """Write the pictures, or check them."""
    if "--check" in sys.argv[1:]:
        sys.exit(f"not up to date: {', '.join(map(str, outdated()))}" if outdated() else 0)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
