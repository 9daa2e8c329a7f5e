"""A Fisher pass as text for people."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.inspect.sensitivity import SensitivityInspection
from quantkit.text.tables import counted, table

SHOWN = 10
"""Linears in the table."""


def pass_text(found: SensitivityInspection) -> str:
    """A finished pass: of what, which losses are known, and its table."""
    types = ", ".join(found.types) or "none yet; a plan with a target measures those that it needs"
    head = f"{found.path}: a Fisher pass {found.document}\nlosses of types: {types}"
    return f"{head}\n\n{sensitivity_text(found.document)}"


def pass_document(found: SensitivityInspection) -> Mapping[str, object]:
    """The same for --json, without the numbers of each linear."""
    document = found.document
    return {
        "path": str(found.path),
        "format": "quantkit sensitivity",
        "model": document.model,
        "job": document.job.model_dump(mode="json"),
        "linears": len(document.linears),
        "unseen": sum(not one.tokens for one in document.linears.values()),
        "types": list(found.types),
    }


def sensitivity_text(found: SensitivityDocument) -> str:
    """The linears whose outputs matter most to the loss, and what was measured on."""
    job, seen = found.job, {name: one for name, one in found.linears.items() if one.tokens}
    most = sorted(seen.items(), key=lambda pair: -pair[1].fisher / pair[1].tokens)[:SHOWN]
    rows = [(name, f"{one.tokens:,}", f"{one.fisher / one.tokens:.3g}", f"{one.fisher:.4g}") for name, one in most]
    unseen = len(found.linears) - len(seen)
    without = f", of which {unseen:,} saw no token" if unseen else ""
    scope = f"{counted(len(found.linears), 'linear')}{without}"
    return "\n".join(
        (
            table(("most sensitive for each token", "tokens", "Fisher for each", "Fisher"), rows),
            "",
            f"{scope}; {job.tokens:,} tokens, one sampled label each, seed {job.seed}.",
            "Fisher: sum over a linear's tokens of the mean over its outputs of g^2, g the gradient of the loss there; "
            "Fisher for each: the same for each of its tokens.",
        )
    )
