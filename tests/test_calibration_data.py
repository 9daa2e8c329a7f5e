"""The shipped text: intact, described, licensed, and its two splits disjoint."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibrate.documents import find_files, read_documents

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "calibration_data"
SPLITS = ("mixed", "eval")
DOMAINS = {"prose", "code", "techdoc", "german", "french", "chinese", "arithmetic", "chat"}
LONG_LINE = 60
PERMISSIVE = ("public domain", "PSF-2.0", "PostgreSQL licence", "Apache-2.0", "CC0-1.0")


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    return json.loads((FOLDER / "SOURCES.json").read_text(encoding="utf-8"))["files"]


def files_of(split: str) -> list[Path]:
    return sorted((FOLDER / split).iterdir())


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("split", SPLITS)
def test_every_file_is_as_recorded(split: str, records: dict[str, dict[str, Any]]) -> None:
    assert {f"{split}/{path.name}" for path in files_of(split)} == {name for name in records if name.startswith(split)}
    for path in files_of(split):
        record, data = records[f"{split}/{path.name}"], path.read_bytes()
        assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest()), path
        assert b"\r" not in data, path


@pytest.mark.parametrize("split", SPLITS)
def test_the_domains_are_of_even_size(split: str) -> None:
    assert {path.stem for path in files_of(split)} == DOMAINS
    sizes = [path.stat().st_size for path in files_of(split)]
    assert max(sizes) < 1.1 * min(sizes)


def test_every_origin_has_a_permissive_licence(records: dict[str, dict[str, Any]]) -> None:
    for name, record in records.items():
        assert record["origins"], name
        for origin in record["origins"]:
            assert origin["packages"], name
            assert origin["licence"].startswith(PERMISSIVE), name
    for licence in ("PSF-2.0", "PostgreSQL", "MIT-chinese-poetry"):
        assert "opyright" in text_of(FOLDER / f"LICENSE-{licence}.txt")


def test_no_long_line_stands_in_both_splits() -> None:
    lines = {split: {line for path in files_of(split) for line in text_of(path).split("\n")} for split in SPLITS}
    assert not {line for line in lines["mixed"] & lines["eval"] if len(line) >= LONG_LINE}


def questions(split: str, openers: tuple[str, ...]) -> Iterator[str]:
    for line in filter(None, text_of(FOLDER / split / "arithmetic.txt").split("\n")):
        yield line.split(" = ")[0] if " = " in line else line[: line.rindex(" has") + len(" has")]
    for line in text_of(FOLDER / split / "chat.jsonl").splitlines():
        for message in json.loads(line)["messages"]:
            if message["role"] == "user":
                opener = next((opener for opener in openers if opener and message["content"].startswith(opener)), "")
                yield message["content"].removeprefix(opener)


@pytest.mark.parametrize("split", SPLITS)
def test_every_exercise_belongs_to_its_split(split: str) -> None:
    spec = importlib.util.spec_from_file_location("nano_synthetic", ROOT / "tools" / "nano_synthetic.py")
    assert spec is not None
    assert spec.loader is not None
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    found = list(questions(split, synthetic.OPENERS))
    assert len(found) > 1000
    assert {synthetic.split_of(question) for question in found} == {split}


@pytest.mark.parametrize("split", SPLITS)
def test_the_loader_reads_all_of_it(split: str, tmp_path: Path) -> None:
    files = find_files([f"builtin:{split}"], tmp_path)
    assert {file.domain for file in files} == DOMAINS
    assert all(read_documents(file)[1] for file in files)


def test_little_of_it_was_trained_on(records: dict[str, dict[str, Any]]) -> None:
    assert all(record["long_lines_also_in_training"] <= 2 for record in records.values())
    assert sum(record["long_lines"] for record in records.values()) > 2000
