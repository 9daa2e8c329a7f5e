"""`quantkit docs`, and what an installed quantkit has to show."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.app import app
from quantkit.text.pages import pages

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "quantkit").rglob("*.py")]


def test_every_page_is_listed_with_its_title_and_shown_without_directives() -> None:
    listed = CliRunner().invoke(app, ["docs"]).stdout
    assert [line.split()[0] for line in listed.splitlines()[2:]] == list(pages())
    assert {path.name for path in (ROOT / "docs").rglob("*.md")} == {f"{name}.md" for name in pages()}
    for name, path in pages().items():
        shown = CliRunner().invoke(app, ["docs", name]).stdout
        title = path.read_text(encoding="utf-8").partition("\n")[0]
        assert shown.startswith(f"{title}\n"), name
        assert title.removeprefix("# ") in listed
        assert "<!--" not in shown, name


@pytest.mark.parametrize(("asked", "page"), [("GGUF", "gguf"), ("docs/reference/recipe.md", "recipe")])
def test_a_page_is_found_as_a_link_names_it(asked: str, page: str) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["docs", asked]).stdout == runner.invoke(app, ["docs", page]).stdout


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("tutorail", "Is it tutorial?"), ("calibration", "Is it own-calibration"), ("zzz", "lists")],
)
def test_a_page_that_is_not_there_is_one_line(asked: str, hint: str) -> None:
    result = CliRunner().invoke(app, ["docs", asked])
    assert result.exit_code == 1
    said, hinted = result.stderr.splitlines()
    assert said == f"error: page {asked!r}: not found."
    assert hint in hinted


def test_no_text_sends_anybody_to_the_index_s_other_quantkit() -> None:
    for path in SOURCES:
        assert not re.search(r"pip install(?: -[\w-]+)* ['\"]?quantkit\b(?!-moe)", path.read_text(encoding="utf-8")), (
            path
        )


def test_messages_name_pages_that_an_installation_has() -> None:
    named = [
        (path.name, found)
        for path in (ROOT / "quantkit").rglob("*.py")
        for found in re.findall(r"quantkit docs ([\w-]+)`", path.read_text(encoding="utf-8"))
    ]
    assert named
    assert [pair for pair in named if pair[1] not in pages()] == []


@pytest.mark.slow
def test_a_wheel_has_pages_recipes_and_texts(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("quantkit_moe-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder, ending in (("docs", ".md"), ("recipes", ".yaml"), ("calibration_data", ".txt")):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(f"*{ending}")}
        assert here, folder
        assert {f"quantkit/data/{name}" for name in here} <= set(names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    listed = subprocess.run(
        [sys.executable, "-c", "from quantkit.cli.app import main; main()", "docs", "tutorial"],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert listed.stdout.startswith("# Tutorial")
