"""Which routed experts were pruned, and by which scores: a part of quantkit.json, and what an unfinished scoring has
done. Plain values, no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from quantkit.documents.values import Count, DocumentPart, Number


class ExpertScore(NamedTuple):
    """Of a routed expert: the mean over its tokens of gate weight times the L2 norm of its output, and how many tokens
    these were (score 0 for none). In a file a list of two numbers."""

    score: Number
    n_tokens: Count


Scores = dict[Count, tuple[ExpertScore, ...]]
"""By layer, in the order of the source's experts."""


class PruningRecord(DocumentPart):
    """The ``pruning`` of quantkit.json."""

    experts: Count
    """Routed experts of a layer in the source."""
    kept: dict[Count, tuple[Count, ...]]
    """By layer: the source's numbers of the experts that stay, in their new order."""
    scores: Scores


class ScoringProgress(DocumentPart):
    """scores.json of OUT.partial: what a resumed conversion need not score again."""

    kind: Literal["quantkit expert scores, unfinished"] = "quantkit expert scores, unfinished"
    after: Count | None = None
    """The layer after which the hidden states were saved; null: none yet."""
    complete: bool = False
    scores: Scores = Field(default_factory=dict)
