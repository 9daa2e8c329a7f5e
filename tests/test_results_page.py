"""docs/results.md is what the files of benchmarks/results say now, and says what they lack."""

from __future__ import annotations

import importlib
import json
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
