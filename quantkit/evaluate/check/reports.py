"""Verdicts -> text for people, JUnit XML for CI servers, markdown for a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from quantkit.evaluate.check.verdict import Check, Verdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 has no way to write."""


def regression_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each thing that got worse."""
    return [f"{verdict.candidate}: {check.line}" for verdict in verdicts for check in verdict.regressions]


def junit_xml(verdicts: Sequence[Verdict]) -> str:
    """A test suite for each candidate, a test case for each check."""
    root = ElementTree.Element("testsuites", _counts([check for verdict in verdicts for check in verdict.checks]))
    root.set("name", "quantkit check")
    for verdict in verdicts:
        suite = ElementTree.SubElement(root, "testsuite", _counts(verdict.checks))
        suite.set("name", _xml(verdict.candidate))
        for check in verdict.checks:
            case = ElementTree.SubElement(suite, "testcase", time="0")
            case.set("classname", _xml(f"quantkit.{verdict.candidate}"))
            case.set("name", _xml(check.name))
            if not check.passed:
                failure = ElementTree.SubElement(case, "failure", message=_xml(check.line), type="regression")
                failure.text = _xml(check.line)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A heading that says whether something got worse; for each candidate a table of its checks, those that failed on
    top."""
    failed = sum(len(verdict.regressions) for verdict in verdicts)
    outcome = "nothing got worse" if not failed else f"{failed} regression{'s' if failed > 1 else ''}"
    blocks = [f"## quantkit check: {outcome}"]
    for verdict in verdicts:
        rows = [
            "| | check | baseline | now | change | allowed |",
            "|---|---|---|---|---|---|",
            *(_row(check) for check in sorted(verdict.checks, key=lambda check: check.passed)),
        ]
        notes = [f"- {_cell(note)}" for note in verdict.notes]
        blocks += [f"### {_cell(verdict.candidate)}", "\n".join(rows), *(["\n".join(notes)] if notes else [])]
    return "\n\n".join(blocks) + "\n"


def _counts(checks: Sequence[Check]) -> dict[str, str]:
    failed = sum(not check.passed for check in checks)
    return {"tests": str(len(checks)), "failures": str(failed), "errors": "0", "skipped": "0", "time": "0"}


def _xml(text: str) -> str:
    return _NOT_XML.sub("?", text)


def _row(check: Check) -> str:
    sign = "✅" if check.passed else "❌"
    name = check.title if check.passed or not check.detail else f"{check.title} ({check.detail})"
    cells = (sign, name, check.was, check.found, check.change, check.limit)
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """Nothing in a candidate's name ends a cell or becomes markup."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split()))
