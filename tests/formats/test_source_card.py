"""What a model card takes over from the source's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.formats.source_card import SourceCard, source_card

MIT = "MIT License\n\nCopyright (c) 2023 Somebody\n"
APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("files", "config", "card"),
    [
        ({}, {}, SourceCard()),
        ({"README.md": "---\nlicense: mit\nbase_model: org/Model-1\n---\n# x"}, {}, SourceCard("org/Model-1", "mit")),
        ({"README.md": '---\nbase_model:\n  - "org/A"\n  - org/B\n---\n'}, {}, SourceCard("org/A")),
        ({"README.md": "---\r\nbase_model: [org/A]\r\nlicense: 'other'\r\n---\r\n"}, {}, SourceCard("org/A", "other")),
        ({"README.md": "# no front matter\nlicense: mit\n"}, {}, SourceCard()),
        ({"README.md": "---\nlicense: mit\n# never closed\n"}, {}, SourceCard()),
        ({"README.md": "---\nlicense: ]{&a *a\nbase_model: /etc/passwd\n---\n"}, {}, SourceCard()),
        ({"LICENSE": MIT}, {}, SourceCard("", "mit")),
        ({"LICENSE.txt": APACHE}, {}, SourceCard("", "apache-2.0")),
        ({"LICENSE": "Terms of our own"}, {}, SourceCard("", "other")),
        ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": APACHE}, {}, SourceCard("", "mit")),
        ({}, {"_name_or_path": "org/Model"}, SourceCard("org/Model")),
        ({}, {"_name_or_path": "/home/me/Model"}, SourceCard()),
        ({}, {"_name_or_path": 7}, SourceCard()),
    ],
)
def test_what_the_folder_tells(
    files: dict[str, str], config: dict[str, object], card: SourceCard, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    assert source_card(tmp_path, config) == card


def test_a_hub_cache_knows_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--Model" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nbase_model: org/Older\n---\n")
    assert source_card(folder, json.loads("{}")).base_model == "org/Model"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    (tmp_path / "LICENSE").write_bytes(b"\xff" * 1000)
    assert source_card(tmp_path, {}) == SourceCard("", "other")
