"""What a report consists of: plain values, which `page` writes as HTML and `markdown` as markdown.

All texts are as the documents have them: whoever writes them into a page escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Spec = Mapping[str, object]
"""A figure for plotly: {"data": [...], "layout": {...}}. Colours are names after "$" (see report.js), so that a page
can change its theme; texts are escaped for the subset of HTML that plotly understands."""


@dataclass(frozen=True, slots=True)
class Card:
    """A headline number. ``spread``: smaller text after it, such as "± 0.0011"."""

    label: str
    value: str
    note: str = ""
    spread: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """The first ``left`` columns are texts, the others numbers. ``long``: not for a model card."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    title: str = ""
    long: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot, a sentence or two on how to read it, and the same numbers as a table. ``alt``: what it shows, for those
    who cannot see it; ``summary``: its gist, for where a long table has no place."""

    title: str
    how: str
    alt: str
    spec: Spec
    table: Table
    zoom: bool = False
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be copied."""

    title: str
    text: str
    language: str


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph. ``warning``: something is not as it should be."""

    text: str
    warning: bool = False


Block = Figure | Table | Code | Note


@dataclass(frozen=True, slots=True)
class Section:
    """``anchor``: its id in the page; ``group``: the checkpoint it is about, "" for all."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]
    group: str = ""


@dataclass(frozen=True, slots=True)
class ReportPage:
    """The whole page. ``groups``: what is said beside the name of a checkpoint that has sections of its own;
    ``checkpoints``: names of all that it is about."""

    title: str
    subtitle: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    warnings: tuple[Note, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict[str, str])
    checkpoints: tuple[str, ...] = ()
