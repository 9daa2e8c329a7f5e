"""docs/results.md is what the files of benchmarks/results say now, and says what they lack."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def docs_results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("docs_results")


def test_the_page_is_up_to_date(docs_results: Any) -> None:
    assert not docs_results.outdated(), "run python tools/docs_results.py"


def test_a_file_without_a_section_is_listed(docs_results: Any, tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text('{"what": "something new", "device": "an abacus"}', encoding="utf-8")
    page = docs_results.page(tmp_path)
    assert "## Other files" in page
    assert "- what: something new\n- device: an abacus\n- date: not recorded\n" in page


def test_tables_have_as_many_cells_in_each_row() -> None:
    width = 0
    for line in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines():
        cells = line.replace("\\|", "").count("|") if line.startswith("|") else 0
        assert not width or not cells or cells == width, line
        width = cells


def test_what_is_missing_is_left_out_or_said(docs_results: Any, tmp_path: Path) -> None:
    assert "## " not in docs_results.page(tmp_path)
    rows = [{"output": "x", "bpw": 4, "bytes": 1000, "kld": {"mean": 0.5}, "seconds": {"total": 2}}]
    (tmp_path / "convert_cuda.json").write_text(json.dumps({"what": "a run", "rows": rows}), encoding="utf-8")
    page = docs_results.page(tmp_path)
    assert page.count("## ") == 1
    for fact in ("command", "device", "date", "versions"):
        assert f"- {fact}: not recorded\n" in page
    assert "| x | 4.000 | 1,000 | 0.50000 ± not recorded | not recorded | not recorded | 2.0 |" in page


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")))
def test_dates_and_devices_of_the_files_are_on_the_page(name: str, docs_results: Any) -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows = document if isinstance(document, list) else document.get("rows", ())
    told = [*([] if document is rows else [document]), *(row.get("evaluation", row) for row in rows)]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = page.split(f"[{name}.json]")[1].split("\n## ")[0]
    facts = {str(part[key]) for part in told for key in ("date", "device") if key in part}
    assert all(fact in section for fact in facts)
    assert facts or "- date: not recorded" in section


@pytest.fixture
def docs_plot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("docs_plot")


def test_the_picture_is_up_to_date_and_the_readme_shows_it(docs_plot: Any) -> None:
    assert not docs_plot.outdated(), "run python tools/docs_plot.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f'"docs/{path.name}"' in readme for path in docs_plot.files())


def test_the_picture_has_every_tool_and_the_best_of_its_settings(docs_plot: Any) -> None:
    drawn = {(tool, is_gguf): points for tool, is_gguf, points in docs_plot.lines()}
    for file, is_gguf in (("peers_tiny", False), ("gguf_tiny", True)):
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))["rows"]
        for row in rows:
            points = drawn[docs_plot.TOOLS.get(row["name"], row["name"]), is_gguf]
            (point,) = [point for point in points if point.scheme == row["scheme"]]
            assert point.kld <= row["kld"] or row["settings"].startswith(f"{row['scheme']}-bytes")
    for name, theme in docs_plot.THEMES.items():
        text = docs_plot.picture(name, docs_plot.lines())
        assert all(f">{tool}</text>" in text for tool, _ in drawn)
        assert text.count(theme["back"]) == 1


def test_the_picture_s_axes_hold_all_points(docs_plot: Any) -> None:
    for _, is_gguf, points in docs_plot.lines():
        left, right = docs_plot.PANELS[is_gguf]
        for point in points:
            assert left < docs_plot.x_of(point.bits, is_gguf) < right
            assert docs_plot.y_of(point.kld + point.error) > docs_plot.TOP
            assert docs_plot.y_of(point.kld - point.error) < docs_plot.BOTTOM


def test_what_a_divergence_means_is_as_measured() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = json.loads((ROOT / "benchmarks" / "results" / "peers_tiny.json").read_text(encoding="utf-8"))["rows"]
    (int4, int3) = (
        next(row for row in rows if row["name"] == "quantkit" and row["scheme"] == scheme)
        for scheme in ("int4", "int3")
    )
    assert (
        f"{int4['kld']:.4f} means here that the most likely token stays the same in {int4['top1']:.1f} % of all places "
        f"and perplexity is {int4['ppl'] / int4['ppl_reference']:.3f} times the original's; {int3['kld']:.4f}, that it "
        f"does in {int3['top1']:.1f} %, and {int3['ppl'] / int3['ppl_reference']:.3f} times."
    ) in readme


def test_divergences_of_the_readme_are_those_of_the_results() -> None:
    known: set[str] = set()
    for name in ("peers_tiny", "gguf_tiny", "convert_cuda", "target"):
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        for row in rows:
            kld, error = (row["kld"], row.get("kld_se")) if "kld_se" in row else row["kld"].values()
            known.add(f"{kld:.4f} ± {error:.4f}")
    measured = (ROOT / "README.md").read_text(encoding="utf-8").split("## Measured")[1].split("## ")[0]
    stated = re.findall(r"0\.\d{4} ± 0\.\d{4}", measured)
    assert len(stated) > 20
    assert [pair for pair in stated if pair not in known] == []
