"""Colours of the page against what they stand on, by WCAG 2.2: a contrast of 4.5 for text, 3 for lines and marks."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

STYLE = (files("quantkit.report") / "templates" / "page.css").read_text(encoding="utf-8")
COLORS = {
    name: {"light": light, "dark": dark}
    for name, light, dark in re.findall(r"--([a-z0-9]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", STYLE)
}
TEXT = [
    *(("ink", back) for back in ("page", "surface", "warning", "line")),
    *((color, back) for color in ("muted", "accent") for back in ("page", "surface")),
    ("surface", "c0"),  # what is written inside the bars
]
MARKS = [*((f"c{number}", "surface") for number in range(8)), ("bad", "surface"), ("bad", "warning")]


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_black_on_white_is_the_largest_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back", "least"), [*((*pair, 4.5) for pair in TEXT), *((*pair, 3.0) for pair in MARKS)]
)
def test_colours_can_be_told_from_what_they_stand_on(theme: str, front: str, back: str, least: float) -> None:
    assert contrast(COLORS[front][theme], COLORS[back][theme]) >= least
