"""evaluation.json: what `quantkit evaluate` found, as versioned models. Plain values, no torch.

Keys keep the order of the models. A number that JSON has no word for (the standard error of a single window) is null
in the file and NaN here.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

_LIST = re.compile(r'\[\n(?:\s+(?:[-+.\w]+|"[^"\\]*"),?\n)+\s*\]')
"""A JSON list without lists or objects in it, an item on each line."""

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""How many: no file makes an integer that is too large for a float."""

HISTOGRAM_EDGES = tuple(10.0 ** (quarter / 4) for quarter in range(-28, 9))
"""Nats per token, 1e-7 to 100, four bins in each power of ten."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Mean(_Part):
    """A value and its standard error over windows."""

    mean: Number
    standard_error: Number

    def shown(self, digits: int) -> str:
        """ "1.2345 ± 0.0067"; "-" for the error of a single window."""
        return estimate(self.mean, self.standard_error, digits)

    def percent(self) -> str:
        """ "12.34% ± 0.56%"."""
        return percent(self.mean, self.standard_error)


_TABLE_WIDTH = 1e7  # from here on digits break tables


def estimate(mean: float, error: float, digits: int) -> str:
    """ "1.2345 ± 0.0067", and "1.2345 ± -" where one window says nothing of the error."""
    return f"{fixed(mean, digits)} ± {'-' if math.isnan(error) else fixed(error, digits)}"


def fixed(value: float, digits: int) -> str:
    """ "1.2345", and "1.2e+30" for what a broken model brings about."""
    return f"{value:.{digits}f}" if abs(value) < _TABLE_WIDTH else f"{value:.1e}"


def percent(mean: float, error: float) -> str:
    """ "12.34% ± 0.56%", and "12.34% ± -"."""
    return f"{fixed(100 * mean, 2)}% ± {'-' if math.isnan(error) else f'{fixed(100 * error, 2)}%'}"


class Divergence(_Part):
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


class Scores(_Part):
    """A candidate against its reference, on all text or on one domain."""

    windows: Count
    tokens: Count
    """Predicted tokens that were scored."""
    reference_perplexity: Mean
    """exp of the mean loss; its error by the delta method."""
    perplexity: Mean
    """Of the candidate."""
    log_ratio: Mean
    """ln(candidate's / reference's perplexity), paired: windows that both find hard do not widen its error."""
    kld: Divergence
    same_top: Mean
    """Share of tokens whose most likely successor is the same."""
    rms_probability_change: Mean
    """Root mean square of the change of the right token's probability."""


class Layer(_Part):
    """A candidate behind one decoder layer, over all tokens of the windows."""

    layer: Count
    hidden_error: Number
    """Root of the mean over tokens of |x' - x|^2 / |x|^2, x being the reference's hidden state."""
    router_agreement: Number | None
    """Share of the experts chosen by the reference that the candidate chose too; null without routed experts."""
    expert_tokens: tuple[Count, ...] | None = None
    """How many tokens the reference sends to each routed expert. Since version 2."""
    expert_errors: tuple[Number, ...] | None = None
    """``hidden_error`` over those tokens only; null for an expert that gets none. Since version 2."""


class Windows(_Part):
    """Means over the tokens of each window, in the text's order, seven significant digits: what it takes to hold two
    evaluations of the same text against each other in pairs."""

    loss: tuple[Number, ...]
    """Of the candidate, nats per token."""
    kld: tuple[Number, ...]
    same_top: tuple[Number, ...]
    layers: tuple[tuple[Number, ...], ...]
    """Of each decoder layer the mean of |x' - x|^2 / |x|^2: the mean over windows is the square of ``hidden_error``."""


class Result(_Part):
    """All scores of one candidate; ``domains`` by the text files' stems."""

    overall: Scores
    domains: dict[str, Scores]
    layers: tuple[Layer, ...]
    windows: Windows | None = None
    """Null in documents of version 1."""


class ModelFacts(_Part):
    """A checkpoint that was read."""

    name: str
    path: str
    """As it was given."""
    format: str
    fingerprint: str
    """sha256 over config, index, names, sizes, headers, and three samples of each file's data."""
    weights: Count
    """Numbers that it stores, MTP layers included."""
    nbytes: Count
    """Bytes of its tensors."""
    notes: tuple[str, ...]
    """What a reader of the scores should know."""

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights if self.weights else math.nan


class Candidate(_Part):
    """A checkpoint and its scores."""

    model: ModelFacts
    result: Result


class NoiseFloor(_Part):
    """The reference against itself in another rounding: what counts as zero."""

    rounding: str
    result: Result


class Protocol(_Part):
    """How text was cut and what was scored."""

    name: Literal["windows", "llama.cpp"]
    description: str
    context: Count
    max_windows_per_file: Count | None
    scored_per_window: Count


class Text(_Part):
    """A file of text. ``tokens``: the whole file's."""

    file: str
    sha256: str
    documents: Count
    tokens: Count
    windows: Count


class ReferenceFile(_Part):
    """The reference was not run: its statistics were read from a file that ``--save-reference`` wrote."""

    path: str
    versions: dict[str, str]
    device: str
    """Of the run that wrote it."""
    top: Count
    """Most likely tokens of each position whose logits it holds."""
    mean_rest: Number
    """Mean probability that the reference gives to all others together: the smaller, the tighter the bound."""
    kld: str
    """How the divergences in this document differ from the true ones."""
    not_available: dict[str, str]
    """What is null in this document, and why."""


class Evaluation(_Part):
    """The whole document."""

    kind: Literal["quantkit evaluation"] = "quantkit evaluation"
    schema_version: Literal[1, 2] = 2
    """2: ``windows``, ``window_domains`` and errors by expert are there."""
    versions: dict[str, str]
    device: str
    arithmetic: str
    protocol: Protocol
    text: tuple[Text, ...]
    tokens_sha256: str
    """Of all windows' token ids (int32): the same for evaluations that can be compared."""
    reference: ModelFacts
    noise_floor: NoiseFloor | None
    candidates: tuple[Candidate, ...]
    window_domains: tuple[str, ...] = ()
    """Of each window the domain it belongs to."""
    reference_file: ReferenceFile | None = None
    seconds: dict[str, float] | None = None
    """Wall seconds by stage, only if asked for: without them the same job gives the same bytes."""

    def __repr__(self) -> str:
        """One line, without the thousands of numbers by window and layer."""
        scores = [(c.model.name, c.result.overall) for c in self.candidates]
        each = [f"{name}: perplexity {o.perplexity.shown(4)}, mean KLD {_shown(o.kld)}" for name, o in scores]
        return f"<Evaluation of {'; '.join(each) or 'no candidate'}; reference {self.reference.name}>"

    __str__ = __repr__

    def document(self) -> dict[str, object]:
        """Plain values for JSON, without ``seconds`` if they were not asked for."""
        return self.model_dump(mode="json", exclude={"seconds"} if self.seconds is None else None)

    def to_json(self) -> str:
        """The file's text."""
        return json_text(self.document())


def _shown(kld: Divergence) -> str:
    return estimate(kld.mean, kld.standard_error, 5)


def json_text(document: object) -> str:
    """A document as a file: indented by one, but a list of numbers or of plain words is one line."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    # No string of JSON holds a line break, so this never matches inside one.
    return re.sub(_LIST, lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"
