"""quantkit.json: what a conversion made, of what, how, and how well. Plain values, no torch.

It holds no times and no memory, so that the same job gives the same bytes. Keys keep the order of the models.
`quantkit convert` sets every field, but of a `LinearRecord` only those that apply. A default says which ones a reader
can do without.
"""

from __future__ import annotations

import json
import math
from typing import Annotated

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer

from quantkit.documents.journal import ExpertRecord, JobHeader, TuningRecord
from quantkit.documents.json_text import finite
from quantkit.documents.pruning import PruningRecord
from quantkit.documents.values import Count, DocumentPart, DraftAgreement, Mean, Number

Loss = Annotated[
    float | None,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if value is not None and math.isfinite(value) else None, when_used="json"),
]
"""None where the key is missing; NaN where the file says null, for a loss that was no number."""


class ValidationScores(DocumentPart):
    """Reference against candidate on held-out windows. Perplexities are exp of the mean loss over all tokens, their
    errors by the delta method over windows; KLD in nats per token; ``perplexity_ratio`` is paired, so its error leaves
    out what both find hard."""

    windows: Count
    tokens: Count
    reference_perplexity: Mean
    candidate_perplexity: Mean
    perplexity_ratio: Mean
    mean_kl: Mean
    median_kl: Number
    p99_kl: Number
    top1: Mean
    """Share of tokens whose most likely successor is the same."""
    draft: DraftAgreement | None = None
    """Null if the output has no MTP layer, and in older documents."""


class ValidationResult(DocumentPart):
    """What the conversion itself measured of an output, read back from the disk, against the source."""

    output: str = ""
    """Its name."""
    scores: ValidationScores
    problems: tuple[str, ...] = ()
    """One line for each limit of the recipe that the scores exceed."""
    limits: bool | None = None
    """Whether the recipe sets limits; null in documents of quantkit 0.1, which did not say."""

    @property
    def passed(self) -> bool | None:
        """True if no limit is exceeded, None if there is none."""
        return None if self.limits is False else not self.problems


class StoredRole(DocumentPart):
    """Tensors of one role that are stored one way. Dropped ones have no bytes."""

    role: str
    stored_as: str
    """ "int4 g128 gptq", "bf16", "dropped"."""
    tensors: Count
    parameters: Count
    nbytes: Count
    """Bytes of tensor data, scales included."""


class CalibrationFile(DocumentPart):
    """Text that a conversion was calibrated with."""

    file: str
    sha256: str
    documents: Count
    tokens: Count
    """The whole file's."""
    rows: Count
    """Token sequences taken."""


class LinearRecord(DocumentPart):
    """A linear with a scheme: quantised, or one that the source had in this scheme already (without loss)."""

    scheme: dict[str, JsonValue]
    """As in a recipe."""
    relative_loss: Loss = None
    """See `TensorRecord`. Missing for what was not quantised."""
    n_tokens: Count = 0
    fallback: str = ""
    """Missing where there was none."""
    output_loss: Loss = None
    """See `TensorRecord`. Missing for methods that are not output-aware."""


class PoorFit(DocumentPart):
    """A linear that loses over five times what its scheme loses on Gaussian weights."""

    name: str
    scheme: str
    """ "int4 g128", "Q4_K"."""
    relative_loss: Number
    gaussian_loss: Number
    """Relative squared error of Gaussian weights in this scheme."""


class ConversionDocument(DocumentPart):
    """The whole document."""

    quantkit: str
    """Version of quantkit."""
    job: JobHeader
    recipe: dict[str, JsonValue]
    """Defaults filled in."""
    source: str = ""
    """Name of the source's folder."""
    output: str
    """Name of the output in the recipe."""
    validated: bool | None = None
    """Whether it keeps the recipe's limits; null if there are none or nothing was measured."""
    validation: ValidationResult | None = None
    tensor_bytes: Count
    bpw: Number
    """Stored bits per weight of the whole checkpoint."""
    contents: tuple[StoredRole, ...] = ()
    calibration: tuple[CalibrationFile, ...] = ()
    expert_tokens: dict[Count, dict[str, tuple[ExpertRecord, ...]]] = Field(default_factory=dict)
    """By layer and block of routed experts."""
    tuning: dict[Count, TuningRecord] = Field(default_factory=dict)
    """By layer. The key is missing where nothing was tuned. Losses of ``tensors`` are those before tuning."""
    pruning: PruningRecord | None = None
    """The key is missing where no experts were pruned."""
    tensors: dict[str, LinearRecord]
    poor_fits: tuple[PoorFit, ...] = ()
    """Largest loss first. The key is missing where there are none."""
    sha256: dict[str, str] = Field(default_factory=dict)
    """sha256 (hex) of each file of the checkpoint but this one and README.md."""

    def to_json(self) -> str:
        """The file's text. What was left out when the document was made stays out."""
        document = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return json.dumps(finite(document), indent=1, allow_nan=False) + "\n"
