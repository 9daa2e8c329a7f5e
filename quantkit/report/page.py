"""Contents -> one HTML file that needs nothing else: style, script, figures and plotly itself are inside.

plotly.js is gzipped in it (2 MB instead of 5) and unpacked by the browser. A content security policy keeps the page
from reaching for anything, whatever a document's texts say; all of them are escaped.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantkit.errors import QuantkitError
from quantkit.report.contents import Block, Code, Figure, Note, ReportPage, Section, Table
from quantkit.version import __version__

_HASH = re.compile(r"[0-9a-f]{40,}\Z")
_DIGIT = re.compile(r"[0-9●]")
_TEMPLATES = "templates"
OPEN = 2
"""More checkpoints than so many are folded away, each to be opened by its name."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A section with an id that no other has, and its blocks with the number of their figure (0 for what is none)."""

    anchor: str
    section: Section
    blocks: tuple[tuple[str, Block, int], ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring sections about the same checkpoint, or about all (no name). ``open``: not folded away."""

    name: str
    note: str
    anchor: str
    sections: tuple[_Placed, ...]
    open: bool


def page(report: ReportPage) -> str:
    """The whole file's text. Raises `QuantkitError` if plotly is not installed."""
    groups, specs = _placed(report)
    environment = Environment(
        loader=PackageLoader("quantkit.report", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        report=report,
        groups=groups,
        style=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        figures=Markup(_script_json(specs)),
        plotly=Markup(_plotly()),
        version=__version__,
        is_hash=_is_hash,
        number_columns=_number_columns,
    )


def _is_hash(text: str) -> bool:
    return _HASH.match(text) is not None


def _number_columns(table: Table) -> list[bool]:
    """Which columns are set as numbers: not what is declared a text, no checksums, and digits somewhere."""
    found: list[bool] = []
    for column in range(len(table.head)):
        cells = [row[column] for row in table.rows if row[column]]
        digits, hashes = any(map(_DIGIT.search, cells)), any(map(_HASH.match, cells))
        found.append(column >= table.left and digits and not hashes)
    return found


def _placed(report: ReportPage) -> tuple[list[_Group], list[object]]:
    specs: list[object] = []
    numbers = itertools.count(1)
    groups: list[_Group] = []
    names = len({section.group for section in report.sections if section.group})
    for name, members in itertools.groupby(report.sections, key=lambda section: section.group):
        placed: list[_Placed] = []
        for section in members:
            blocks = tuple((_kind(block), block, _number(block, specs)) for block in section.blocks)
            placed.append(_Placed(f"{section.anchor}-{next(numbers)}", section, blocks))
        groups.append(_Group(name, report.groups.get(name, ""), f"group-{next(numbers)}", tuple(placed), names <= OPEN))
    return groups, specs


def _number(block: Block, specs: list[object]) -> int:
    if not isinstance(block, Figure):
        return 0
    specs.append({**block.spec, "zoom": block.zoom})
    return len(specs)


def _kind(block: Block) -> str:
    match block:
        case Figure():
            return "figure"
        case Table():
            return "table"
        case Code():
            return "code"
        case Note():
            return "note"


def _resource(name: str) -> str:
    return (files("quantkit.report") / _TEMPLATES / name).read_text(encoding="utf-8")


def _script_json(value: object) -> str:
    """JSON that no text in it can end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    """plotly.js, gzipped, in lines of base64."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise QuantkitError(
            "the HTML page is drawn by plotly, which is not installed.",
            hint="Install plotly (the extra `report`), or give --markdown.",
        ) from None
    packed = gzip.compress(str(get_plotlyjs()).encode(), 9, mtime=0)
    return "\n".join(_lines(base64.b64encode(packed).decode()))


def _lines(text: str) -> Iterator[str]:
    for start in range(0, len(text), 32768):
        yield text[start : start + 32768]
