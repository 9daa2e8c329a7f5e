"""The page in a real browser: plots are drawn, nothing complains, nothing is loaded, nothing sticks out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.documents.read import read_documents
from quantkit.report.build import report_of
from quantkit.report.page import page
from quantkit.report.scored import scored_checkpoints
from tests.report.browser import Browser, Page, find_browser, started
from tests.report.jobs import conversion, evaluation, written
from tests.report.test_page import HOSTILE

MARKS = ".point, .js-line, .scatterlayer .point, .heatmaplayer image, .heatmaplayer path"
UNDRAWN = (
    "[...document.querySelectorAll('.plot')].filter((plot) => !plot.closest('details:not([open])')"
    f" && !plot.querySelector('{MARKS}')).map((plot) => plot.ariaLabel)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium: install it (apt-get install chromium), or name it in $CHROMIUM")
    with started(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of plot: three checkpoints, one of V3's size, names that would like to be markup."""
    folder = tmp_path_factory.mktemp("outputs")
    large = written(folder / "large", conversion(layers=61, experts=256, nbytes=30)).parent
    named = conversion(nbytes=20)
    named["contents"][0]["role"] = HOSTILE
    paths = [
        large,
        *(written(folder / name, named | {"tensor_bytes": size}).parent for name, size in (("a", 20), ("b", 10))),
    ]
    candidates = {str(large): (30, 0.01), str(paths[1]): (20, 0.02), HOSTILE: (10, 0.2)}
    scored = written(folder, evaluation(candidates), "evaluation.json")
    path = folder / "a report.html"
    path.write_text(page(report_of(scored_checkpoints(read_documents([*paths, scored])))), encoding="utf-8")
    return path


def check(opened: Page, width: int) -> None:
    assert opened.troubles() == []
    assert opened.value("document.getElementById('no-plots').hidden")
    assert opened.value(UNDRAWN) == []
    assert opened.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.plot svg')].filter((s) => s.getBoundingClientRect().right > innerWidth)"
    assert opened.value(f"{wide}.length") == 0
    assert opened.value("window.taken === undefined && document.querySelectorAll('img, main script').length === 0")


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1600, True)])
def test_plots_are_drawn_at_every_width_in_both_themes(browser: Browser, file: Path, width: int, dark: bool) -> None:
    opened = browser.open(file, width, dark=dark)
    check(opened, width)
    red = int(re.findall(r"\d+", opened.value("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red < 60) == dark
    opened.close()


def test_themes_folds_and_values_answer_the_reader(browser: Browser, file: Path) -> None:
    opened = browser.open(file, 1200)
    grid = "document.querySelector('.plot .gridlayer path').style.stroke"
    light = opened.value(grid)
    opened.value("document.getElementById('theme').click()")
    opened.wait_for(f"{grid} !== {light!r}")
    assert opened.value("document.documentElement.dataset.theme") == "dark"

    opened.value("document.querySelectorAll('details.group').forEach((group) => { group.open = true })")
    opened.wait_for(f"({UNDRAWN}).length === 0")
    opened.wait_for("document.querySelectorAll('details.group .heatmaplayer image').length > 1")

    opened.value("(window.tokens = document.querySelector('[aria-label*=\"15,360 experts\"]')).scrollIntoView()")
    x, y = opened.value("(({x, y, width, height}) => [x + width / 2, y + height / 2])(tokens.getBoundingClientRect())")
    opened.hover(x, y)
    opened.wait_for("tokens.querySelector('.hoverlayer .hovertext')")
    told = opened.value("tokens.querySelector('.hovertext').textContent")
    assert re.match(r"layer \d+, expert \d+[\d,]+ tokens", told), told
    check(opened, 1200)
    opened.close()


def test_a_phone_shows_that_tables_scroll_and_the_links_stand_below_the_title(browser: Browser, file: Path) -> None:
    opened = browser.open(file, 390)
    overflowing = "[...document.querySelectorAll('.scroll')].filter((s) => s.scrollWidth > s.clientWidth)"
    assert opened.value(f"{overflowing}.length") > 0
    shadows = f"{overflowing}.every((s) => getComputedStyle(s).backgroundAttachment.includes('local, local, scroll'))"
    assert opened.value(shadows)
    left = "document.querySelector({!r}).getBoundingClientRect().left"
    padding = "parseFloat(getComputedStyle(document.querySelector('nav a')).paddingLeft)"
    assert opened.value(f"{left.format('nav a')} + {padding} - {left.format('h1')}") == pytest.approx(0, abs=0.5)
    opened.close()
