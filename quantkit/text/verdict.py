"""Verdicts of a check as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.evaluate.check.verdict import Verdict
from quantkit.text.tables import table


def verdicts_text(verdicts: Sequence[Verdict]) -> str:
    """A table for each candidate, its notes under it, and how many checks failed."""
    blocks = [_verdict_text(verdict) for verdict in verdicts]
    failed = sum(len(verdict.regressions) for verdict in verdicts)
    total = sum(len(verdict.checks) for verdict in verdicts)
    blocks.append(f"{failed} of {total} checks failed" if failed else f"all {total} checks passed")
    return "\n\n".join(blocks)


def _verdict_text(verdict: Verdict) -> str:
    rows = [
        (check.title, check.was, check.found, check.change, check.limit, "ok" if check.passed else "WORSE")
        for check in verdict.checks
    ]
    head = (verdict.candidate, "baseline", "now", "change", "allowed", "")
    return "\n".join([table(head, rows), *(f"note: {note}" for note in verdict.notes)])
