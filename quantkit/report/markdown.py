"""Contents -> markdown for a model card: headline numbers, tables, recipe, provenance. Figures appear as their tables;
tables with a row for each layer stay in the HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterator

from quantkit.report.contents import Block, Card, Code, Figure, Note, ReportPage, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$!&])")


def markdown(report: ReportPage) -> str:
    """The whole text, headings from the second level down: a card has its own title."""
    parts = [f"## {escaped(report.title)}", escaped(report.subtitle)]
    parts += [f"> **{escaped(note.text)}**" for note in report.warnings]
    parts.append(_table(Table(("", ""), tuple((card.label, _card(card)) for card in report.cards), left=2)))
    for section in report.sections:
        blocks = [text for block in section.blocks for text in _block(block)]
        if blocks:
            group = f"{section.group}: " if section.group else ""
            parts += [f"### {escaped(group + section.title)}", *blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _card(card: Card) -> str:
    value = f"{card.value} {card.spread}".strip()
    return f"{value} ({card.note})" if card.note else value


def escaped(text: str) -> str:
    """One line that markdown shows as it is: a text from a file cannot become markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _block(block: Block) -> Iterator[str]:
    match block:
        case Figure():
            if not block.table.long:
                yield f"**{escaped(block.title)}**"
                yield _table(block.table)
            elif block.summary:
                yield escaped(block.summary)
        case Table():
            if not block.long:
                if block.title:
                    yield f"**{escaped(block.title)}**"
                yield _table(block)
        case Code():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", block.text)), default=0))
            yield f"**{escaped(block.title)}**"
            yield f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"
        case Note():
            yield escaped(block.text)


def _table(table: Table) -> str:
    rules = ["---" if column < table.left else "---:" for column in range(len(table.head))]
    lines = [_row(table.head), f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(_row(row) for row in table.rows)])


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"
