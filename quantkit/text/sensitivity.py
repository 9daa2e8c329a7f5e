"""A Fisher pass as text for people."""

from __future__ import annotations

from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.text.tables import counted, table

SHOWN = 10
"""Linears in the table."""


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
            "Fisher: sum over tokens of the mean over outputs of the squared gradient of the loss.",
        )
    )
