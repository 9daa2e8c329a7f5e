"""`quantkit report`: what is written where, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.app import app
from tests.report.jobs import conversion, evaluation, written

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "w4", conversion())
    return Path("w4")


def test_the_page_goes_into_the_current_folder(out: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0
    assert result.stdout.startswith("report.html  ")
    assert "<title>w4 · quantkit report</title>" in Path("report.html").read_text(encoding="utf-8")


def test_markdown_goes_to_stdout_or_into_a_file(out: Path) -> None:
    shown = CliRunner().invoke(app, ["report", str(out), "--markdown", "--title", "Mine"])
    assert shown.stdout.startswith("## Mine\n")
    assert not Path("report.html").exists()
    result = CliRunner().invoke(app, ["report", str(out), "--markdown", "--title", "Mine", "-o", "card.md"])
    assert result.exit_code == 0
    assert Path("card.md").read_text(encoding="utf-8") == shown.stdout


def test_documents_are_never_overwritten(out: Path) -> None:
    path = written(Path(), evaluation({"x": (1, 0.1)}), "e.json")
    before = path.read_bytes()
    result = CliRunner().invoke(app, ["report", str(path), "-o", "w4/../e.json"])
    assert result.exit_code == 1
    assert "is a document that the report is made of" in result.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["w4", "no/report.html"])
def test_a_place_that_is_no_file_is_refused(out: Path, place: str) -> None:
    result = CliRunner().invoke(app, ["report", str(out), "-o", place])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {place}: is no place for a file.\nhint: ")


def test_a_folder_without_documents_is_refused(out: Path) -> None:
    result = CliRunner().invoke(app, ["report", "."])
    assert result.exit_code == 0  # w4 is a folder in it
    Path("empty").mkdir()
    result = CliRunner().invoke(app, ["report", "empty"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: empty: holds no quantkit.json")


def without_plotly(*words: str) -> subprocess.CompletedProcess[str]:
    """A command where plotly is not installed."""
    code = "import sys; sys.modules['plotly'] = None; from quantkit.cli.app import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, text=True, capture_output=True, check=False, env=environment)


def test_the_page_names_the_package_that_it_needs(out: Path) -> None:
    done = without_plotly("report", str(out))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: the HTML page is drawn by plotly, which is not installed.",
        "hint: Install plotly (the extra `report`), or give --markdown.",
    ]
    assert not Path("report.html").exists()


def test_markdown_needs_no_plotly(out: Path) -> None:
    done = without_plotly("report", str(out), "--markdown")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("## w4\n")


def test_an_ending_says_the_form(out: Path) -> None:
    assert CliRunner().invoke(app, ["report", str(out), "-o", "r.md"]).exit_code == 0
    assert Path("r.md").read_text(encoding="utf-8").startswith("## w4\n")
    for words in (["-o", "r.txt"], ["-o", "page"], ["--markdown", "-o", "r.html"]):
        result = CliRunner().invoke(app, ["report", str(out), *words])
        assert result.exit_code == 1
        assert "was asked for, and the name ends in" in result.stderr
        assert not Path(words[-1]).exists()


def test_another_file_is_replaced_only_by_force(out: Path) -> None:
    written(Path("q4"), conversion())
    page, card = Path("report.html"), Path("card.md")
    for _ in range(2):
        assert CliRunner().invoke(app, ["report", "w4"]).exit_code == 0
        assert CliRunner().invoke(app, ["report", "w4", "-o", str(card)]).exit_code == 0
    assert CliRunner().invoke(app, ["report", "w4", "--title", "Another heading"]).exit_code == 0
    card.write_text(f"{card.read_text(encoding='utf-8')}My own words.\n", encoding="utf-8")
    before = page.read_bytes(), card.read_bytes()
    for words in (["q4"], ["w4", "q4"], ["w4", "-o", str(card)]):
        result = CliRunner().invoke(app, ["report", *words])
        assert result.exit_code == 1
        assert ": exists already, and is no report on the same checkpoints.\nhint: " in result.stderr
    assert (page.read_bytes(), card.read_bytes()) == before
    assert CliRunner().invoke(app, ["report", "q4", "--force"]).exit_code == 0
    assert "<title>q4 " in page.read_text(encoding="utf-8")
