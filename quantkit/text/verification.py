"""A verification as text, and as a document for --json."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.text.tables import both_units
from quantkit.verify.verification import Finding, Verification


def verification_text(found: Verification) -> str:
    """A headline, one line for each fault and note, what was read, and the verdict."""
    runtimes = ", ".join(found.runtimes)
    lines = [f"{found.path}: {found.held}, for {runtimes}"]
    lines += [_line("fault", finding) for finding in found.faults]
    lines += [_line("note", finding) for finding in found.notes]
    contents = found.contents
    if contents.hashed:
        files = "1 file" if contents.hashed == 1 else f"{contents.hashed} files"
        lines.append(f"sha256: {files}, {both_units(contents.hashed_bytes)}, as quantkit.json says")
    if contents.decoded:
        compared = ", and compared with the original" if contents.compared else ""
        counted = "1 linear" if contents.decoded == 1 else f"{contents.decoded} linears"
        lines.append(f"decoded: {counted}{compared}")
    if contents.not_decoded:
        lines.append("decoded: no linears, because of the fault" + ("s" if len(found.faults) > 1 else ""))
    return "\n".join([*lines, _verdict(found)])


def _line(kind: str, finding: Finding) -> str:
    return f"{kind}: {f'{finding.runtime}: ' if finding.runtime else ''}{finding.text}"


def _verdict(found: Verification) -> str:
    if found.passed:
        return "sound: no faults"
    return f"NOT SOUND: {len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}"


def verification_document(found: Verification) -> Mapping[str, object]:
    """For --json."""
    return {
        "path": str(found.path),
        "stored_as": found.stored_as,
        "runtimes": list(found.runtimes),
        "tensors": found.tensors,
        "passed": found.passed,
        "findings": [
            {"runtime": finding.runtime or None, "fault": finding.fault, "text": finding.text}
            for finding in found.findings
        ],
        "hashed_files": found.contents.hashed,
        "hashed_bytes": found.contents.hashed_bytes,
        "decoded_linears": found.contents.decoded,
        "compared_linears": found.contents.compared,
    }
