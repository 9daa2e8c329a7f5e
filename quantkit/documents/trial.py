"""What a trial found: some layers of a conversion, and what the whole will take."""

from __future__ import annotations

import json

from pydantic import JsonValue

from quantkit.documents.json_text import finite
from quantkit.documents.values import Count, DocumentPart, Number


class TrialLayer(DocumentPart):
    """A layer after which the quantised model was compared with the original, on held-out text."""

    layer: Count
    quantised: bool
    """False for a layer that only was passed."""
    hidden_error: Number
    """Root of the mean over tokens of |x' - x|^2 / |x|^2, x being the hidden state."""
    router_agreement: Number | None = None
    """Share of the original's chosen experts that were chosen too; None without routed experts."""
    relative_loss: Number | None = None
    """Mean over its quantised linears; see `TensorRecord`."""


class TrialOutput(DocumentPart):
    """One output of the recipe. ``nbytes``: of the whole, exact."""

    name: str
    nbytes: Count
    layers: tuple[TrialLayer, ...]
    fallbacks: Count
    """Linears of these layers that fell back to a weaker method."""


class TrialDocument(DocumentPart):
    """OUT.trial.json. It belongs to no checkpoint: the tensors of a trial are not kept."""

    trial: tuple[Count, ...]
    """The layers that were quantised."""
    quantkit: str
    device: str
    source: str
    recipe: dict[str, JsonValue]
    outputs: tuple[TrialOutput, ...]
    windows: Count
    tokens: Count
    """Of the held-out text."""
    seconds: dict[str, Number]
    """What the trial took, by stage."""
    peak_rss_bytes: Count
    whole_seconds: dict[str, Number]
    """What the whole conversion should take, by kind of step: its schedule, corrected by what the trial took."""
    disk_bytes: Count
    """What the whole needs at its peak."""

    @property
    def total_seconds(self) -> float:
        """Of the whole conversion."""
        return sum(self.whole_seconds.values())

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(finite(self.model_dump(mode="json")), indent=1, allow_nan=False) + "\n"
