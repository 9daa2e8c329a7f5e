"""evaluation.json: what `quantkit evaluate` found. Plain values, no torch.

Keys keep the order of the models. `quantkit evaluate` sets every field. A default says which ones a reader can do
without: those marked "since version 2" are missing in files of the first version, the others may be in files of
strangers.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from quantkit.documents.json_text import json_text
from quantkit.documents.values import Count, DocumentPart, DraftAgreement, Mean, Number, estimate

SCHEMA_VERSIONS = (1, 2)
"""Versions of the document: 2 has `Windows`, the domain of each window and errors by expert. Reports take what they
know of a later one."""
HISTOGRAM_EDGES = tuple(10.0 ** (quarter / 4) for quarter in range(-28, 9))
"""Nats per token, 1e-7 to 100, four bins in each power of ten."""


class Divergence(DocumentPart):
    """KL divergence of the candidate from the reference, nats per token. Quantiles over tokens are interpolated."""

    mean: Number
    standard_error: Number
    median: Number
    p90: Number
    p99: Number
    p999: Number
    max: Number
    histogram: tuple[Count, ...] | None = None
    """Tokens below the first of `HISTOGRAM_EDGES`, between each two of them, and from the last on. Since version 2."""


class Scores(DocumentPart):
    """A candidate against its reference, on all text or on one domain."""

    windows: Count
    tokens: Count
    """Predicted tokens that were scored."""
    reference_perplexity: Mean
    """exp of the mean loss; its error by the delta method."""
    perplexity: Mean
    """Perplexity of the candidate."""
    log_ratio: Mean
    """ln(candidate's / reference's perplexity), paired: windows that both find hard do not widen its error."""
    kld: Divergence
    same_top: Mean
    """Share of tokens whose most likely successor is the same."""
    rms_probability_change: Mean
    """Root mean square of the change of the right token's probability."""


class Layer(DocumentPart):
    """A candidate's hidden states after one decoder layer, over all tokens of the windows."""

    layer: Count
    hidden_error: Number
    """Root of the mean over tokens of |x' - x|^2 / |x|^2, x being the reference's hidden state."""
    router_agreement: Number | None = None
    """Share of the experts chosen by the reference that the candidate chose too; null without routed experts."""
    expert_tokens: tuple[Count, ...] | None = None
    """How many tokens the reference sends to each routed expert. Since version 2."""
    expert_errors: tuple[Number, ...] | None = None
    """``hidden_error`` over those tokens only; null for an expert that gets none. Since version 2."""


class Windows(DocumentPart):
    """Means over the tokens of each window, in the text's order, seven significant digits: enough to compare
    two evaluations of the same text window by window."""

    loss: tuple[Number, ...]
    """Mean loss of the candidate, nats per token."""
    kld: tuple[Number, ...]
    same_top: tuple[Number, ...]
    layers: tuple[tuple[Number, ...], ...]
    """For each decoder layer the mean of |x' - x|^2 / |x|^2: the mean over windows is the square of
    ``hidden_error``."""


class Result(DocumentPart):
    """All scores of one candidate; ``domains`` by the text files' stems."""

    overall: Scores
    domains: dict[str, Scores] = Field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    windows: Windows | None = None
    """Null in documents of version 1."""
    draft: DraftAgreement | None = None
    """Missing if the checkpoint has no MTP layer, and in older documents."""

    @model_serializer(mode="wrap")
    def _written(self, whole: SerializerFunctionWrapHandler) -> dict[str, object]:
        """What was read without ``draft`` is written without it."""
        values: dict[str, object] = whole(self)
        if self.draft is None:
            values.pop("draft", None)
        return values


class CheckpointFacts(DocumentPart):
    """A checkpoint that was read."""

    name: str
    path: str
    """As it was given."""
    format: str
    fingerprint: str = ""
    """sha256 over config, index, names, sizes, headers, and three samples of each file's data."""
    weights: Count
    """Numbers that it stores, MTP layers included."""
    nbytes: Count
    """Bytes of its tensors."""
    notes: tuple[str, ...] = ()
    """What a reader of the scores should know."""

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights if self.weights else math.nan


class Candidate(DocumentPart):
    """A checkpoint and its scores."""

    model: CheckpointFacts
    result: Result


class NoiseFloor(DocumentPart):
    """The reference against itself in another rounding: what counts as zero."""

    rounding: str = ""
    result: Result


class ScoringProtocol(DocumentPart):
    """How text was cut and what was scored."""

    name: Literal["windows", "llama.cpp"]
    description: str = ""
    context: Count
    max_windows_per_file: Count | None = None
    scored_per_window: Count = 0


class EvaluationText(DocumentPart):
    """A file of text. ``tokens``: the whole file's."""

    file: str
    sha256: str
    documents: Count = 0
    tokens: Count
    windows: Count


class ReferenceFile(DocumentPart):
    """The reference was not run: its statistics were read from a file that ``--save-reference`` wrote."""

    path: str
    versions: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    """Device of the run that wrote it."""
    top: Count
    """Most likely tokens of each position whose logits it holds."""
    mean_rest: Number = math.nan
    """Mean probability that the reference gives to all others together: the smaller, the tighter the bound."""
    kld: str = ""
    """How the divergences in this document differ from the true ones."""
    not_available: dict[str, str] = Field(default_factory=dict)
    """What is null in this document, and why."""


class Evaluation(DocumentPart):
    """The whole document."""

    kind: Literal["quantkit evaluation"] = "quantkit evaluation"
    schema_version: Count = SCHEMA_VERSIONS[-1]
    """One of `SCHEMA_VERSIONS`, or a later one."""
    versions: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    arithmetic: str = ""
    protocol: ScoringProtocol
    text: tuple[EvaluationText, ...] = ()
    tokens_sha256: str = ""
    """sha256 (hex) of all windows' token ids (int32): the same for evaluations that can be compared."""
    reference: CheckpointFacts
    noise_floor: NoiseFloor | None = None
    candidates: tuple[Candidate, ...]
    window_domains: tuple[str, ...] = ()
    """For each window the domain that it belongs to."""
    reference_file: ReferenceFile | None = None
    seconds: dict[str, float] | None = None
    """Wall seconds by stage, only if asked for: without them the same job gives the same bytes."""

    def __repr__(self) -> str:
        """One line, without the thousands of numbers by window and layer."""
        scores = [(c.model.name, c.result.overall) for c in self.candidates]
        each = [f"{name}: perplexity {o.perplexity.shown(4)}, mean KLD {_estimate(o.kld)}" for name, o in scores]
        return f"<Evaluation of {'; '.join(each) or 'no candidate'}; reference {self.reference.name}>"

    __str__ = __repr__

    def document(self) -> dict[str, object]:
        """Plain values for JSON, without ``seconds`` if they were not asked for."""
        return self.model_dump(mode="json", exclude={"seconds"} if self.seconds is None else None)

    def to_json(self) -> str:
        """The file's text."""
        return json_text(self.document())


def _estimate(kld: Divergence) -> str:
    return estimate(kld.mean, kld.standard_error, 5)
