"""A calibration set as text for people: what it holds, what was left out, and the words that use it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from quantkit.documents.calibration_set import CalibrationSet
from quantkit.text.tables import table

_SHORTHAND_ROW = 2048
"""sequence_length where options stand for a recipe."""
_PLAIN = re.compile(r"[\w./-]+")
"""Names that YAML takes without quotes."""


def calibration_set_text(made: CalibrationSet, out: Path | None = None) -> str:
    """Headline, table, notes, and lines for a command and a recipe. ``out``: the set as it was named."""
    name = made.file if out is None else str(out)
    counted = f"estimated at {made.counted_by}" if made.is_estimate else f"counted by {made.counted_by}"
    head = f"{name}: {made.documents:,} documents, {made.tokens:,} tokens ({counted})"
    return "\n\n".join([head, _contents(made), "\n".join(_notes(made)), _use(made, name)])


def usable_tokens(made: CalibrationSet) -> tuple[int, int]:
    """(tokens that a recipe may ask for, in whole rows; tokens of a row)."""
    tokens = min(made.tokens, made.tokens_asked)
    row = min(made.sequence_length, tokens)
    return tokens // row * row, row


def _contents(made: CalibrationSet) -> str:
    rows = [
        (one.domain, one.script, f"{one.documents:,}", f"{one.tokens:,}", f"{one.tokens / made.tokens:.1%}")
        for one in made.contents
    ]
    rows.append(("total", "", f"{made.documents:,}", f"{made.tokens:,}", "100.0%"))
    return table(("domain", "script", "documents", "tokens", "share"), rows, left=2, rule_before_last=True)


def _notes(made: CalibrationSet) -> list[str]:
    out = made.left_out
    lines = [
        f"left out: {out.exact_duplicates:,} exact and {out.near_duplicates:,} near duplicates, {out.excluded:,} that "
        f"share text with evaluation text, {out.long_chats:,} long chats"
    ]
    if made.is_short:
        lines.append(
            f"note: {made.tokens_asked:,} tokens were asked for, all that the sources hold is {made.tokens:,}: give "
            "more text for more."
        )
    if made.is_estimate:
        lines.append("note: no tokenizer counted the tokens: with --tokenizer MODEL they are the model's.")
    return lines


def _use(made: CalibrationSet, name: str) -> str:
    tokens, row = usable_tokens(made)
    data = name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)
    lines = [f"calibration: {{data: [{data}], tokens: {tokens}, sequence_length: {row}}}"]
    if row == _SHORTHAND_ROW:
        lines.insert(0, f"quantkit convert MODEL -o OUT --scheme w4a16 --data {shlex.quote(name)} --tokens {tokens}")
    return "\n  ".join(["use it (in a recipe, a name counts from the recipe's folder):", *lines])
