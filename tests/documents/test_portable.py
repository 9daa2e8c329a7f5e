"""Absolute paths stay on the machine that they belong to."""

from __future__ import annotations

import pytest

from quantkit.documents.portable import without_folder, without_folders


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/text/a.txt", "a.txt"),
        ("~/text/*.txt", "*.txt"),
        (r"C:\Users\me\a.txt", "a.txt"),
        ("text/a.txt", "text/a.txt"),
        ("builtin:mixed", "builtin:mixed"),
        ("role:expert|mlp", "role:expert|mlp"),
        ("/", "/"),
    ],
)
def test_only_absolute_paths_lose_their_folder(text: str, kept: str) -> None:
    assert without_folder(text) == kept


def test_nested_values() -> None:
    values: dict[str, object] = {"calibration": {"data": ["/a/b.txt", "c.txt"], "tokens": 5}, "imatrix": None}
    assert without_folders(values) == {"calibration": {"data": ["b.txt", "c.txt"], "tokens": 5}, "imatrix": None}
