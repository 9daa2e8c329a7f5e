"""The documentation's pages: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import QuantkitError

FIRST = ("index", "tutorial")
"""What a list of pages begins with."""
_COMMENT = re.compile(r"^<!-- .*? -->\n", re.MULTILINE)
"""Directives for the test that runs the pages' commands."""


def pages() -> dict[str, Path]:
    """Name -> file of each page, those of `FIRST` first. {} if an installation lacks them."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "data" / "docs", package.parent / "docs"):
        if folder.is_dir():
            found = {path.stem: path for path in sorted(folder.rglob("*.md"))}
            return {name: found[name] for name in (*FIRST, *found) if name in found}
    return {}


def page_text(name: str) -> str:
    """A page's markdown. ``name``: "gguf", or as a link has it, "docs/gguf.md". Raises `QuantkitError` for a page that
    is not there."""
    known = pages()
    stem = Path(name).name.removesuffix(".md").casefold()
    if stem not in known:
        raise QuantkitError(f"page {name[:60]!r}: not found.", hint=_similar(stem, known))
    return _COMMENT.sub("", known[stem].read_text(encoding="utf-8"))


def page_titles() -> list[tuple[str, str]]:
    """(name, heading) of each page."""
    return [(name, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for name, path in pages().items()]


def _similar(stem: str, known: Mapping[str, Path]) -> str:
    close = difflib.get_close_matches(stem, tuple(known), n=2, cutoff=0.5)
    close += [name for name in known if stem and stem in name and name not in close]
    return f"Is it {' or '.join(close[:2])}?" if close else "`quantkit docs` lists the pages."
