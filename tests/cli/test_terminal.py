"""Names and signs that the terminal's encoding does not have: escaped, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (ROOT / "examples" / "nano-deepseek-v3" / "config.json").read_bytes()
NAME = "m\u4e2d\u00e9\U0001f600"
RECIPE = ("-r", "nano-demo")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a name that no 8-bit encoding has whole."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    return folder


def planned(encoding: str, folder: str, *words: str) -> bytes:
    """What `quantkit plan` prints of a folder on a terminal of this encoding."""
    command = [sys.executable, "-m", "quantkit", "plan", folder, *RECIPE, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode(errors="replace")
    return done.stdout


def test_latin_1_gets_escapes_for_what_it_lacks(model: Path) -> None:
    first = planned("latin-1", str(model)).splitlines()[0].decode("latin-1")
    assert f"{model.parent}/m\\u4e2d\u00e9\\U0001f600: 171 tensors" in first


def test_ascii_and_utf_8_show_the_table(model: Path) -> None:
    # click takes ASCII for a terminal whose encoding nobody has set, and writes UTF-8.
    for encoding in ("ascii", "utf-8"):
        printed = planned(encoding, str(model)).decode("utf-8")
        assert f"{model}: 171 tensors" in printed
        assert "shared_expert" in printed


def test_a_name_that_is_no_text_is_shown_with_escapes(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"m\xff")
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    assert b"m\\udcff: 171 tensors" in planned("utf-8", str(folder))


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_json_stays_json(model: Path, encoding: str) -> None:
    printed = planned(encoding, str(model), "--json")
    assert json.loads(printed.decode("utf-8"))["source"]["path"] == str(model)
    assert printed.isascii() == (encoding != "utf-8")
