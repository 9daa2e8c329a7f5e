"""sensitivity.json: how much the loss feels errors of each linear's output, from one Fisher pass over the original
model. Plain values, no torch.

It holds no times and no memory, so that the same job gives the same bytes. `quantkit sensitivity` sets every field but
``losses``; defaults say what a reader can do without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from quantkit.documents.conversion import CalibrationFile
from quantkit.documents.json_text import finite, json_text
from quantkit.documents.read import document_bytes, parsed_document
from quantkit.documents.values import Count, DocumentPart, Number
from quantkit.errors import OutputError

Some = Annotated[int, Field(ge=1, lt=2**31)]
"""At least one."""
SENSITIVITY = "sensitivity.json"
"""Name of the document in the folder of a Fisher pass."""
PROGRESS = "unfinished.json"
"""In place of it while the pass goes on."""


class FisherJob(DocumentPart):
    """What the numbers follow from. A resumed pass must state the same."""

    quantkit: str
    """Version of quantkit."""
    torch: str
    source: str
    """sha256 over headers, config and samples of the source checkpoint, as in a conversion's record."""
    tokenizer: str | None = None
    """sha256 of the source's tokenizer; null if it has none."""
    tokens_sha256: str
    """sha256 (hex) of all token ids (int32)."""
    rows: Some
    """Token sequences."""
    length: Some
    """Tokens of each."""
    seed: Count
    """Of the sampled labels, and of the places where rows begin."""
    device: str
    threads: Count
    dtype: Literal["F32", "BF16"]
    """Of the tensors in the layers' files."""
    hidden: Some
    """Width of the residual stream."""
    sublayers: tuple[Some, ...]
    """Of each decoder layer: so many gradients are in its file."""

    @property
    def tokens(self) -> int:
        """Positions, each with one sampled label."""
        return self.rows * self.length


class LinearFisher(DocumentPart):
    """A linear, or a routed expert's linear over the tokens that the router sent there."""

    tokens: Count
    fisher: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Sum over these tokens of the mean over outputs of g^2; g is the gradient, with respect to the linear's output, of
    the cross-entropy summed over all positions, in nats."""


class SensitivityDocument(DocumentPart):
    """The whole document."""

    kind: Literal["quantkit sensitivity"] = "quantkit sensitivity"
    job: FisherJob
    model: str = ""
    """Name of the source's folder, for people; "" in older documents."""
    text: tuple[CalibrationFile, ...] = ()
    linears: dict[str, LinearFisher]
    """By name, every linear of the decoder layers that the loss depends on smoothly. An indexer's are missing: it
    chooses keys, and a choice has no gradient."""
    losses: dict[str, dict[str, Number]] | None = None
    """Linear -> type -> predicted rise of the loss by that type, nats per token; null until something adds it."""

    def __str__(self) -> str:
        """Which pass it is, in a few words."""
        job, model = self.job, f"of {self.model}: " if self.model else "over "
        size = f"{len(job.sublayers):,} layers of width {job.hidden:,}"
        return f"{model}{size}, {job.tokens:,} tokens in rows of {job.length:,}, seed {job.seed}"

    def to_json(self) -> str:
        """The file's text."""
        return json_text(finite(self.model_dump(mode="json")))


class FisherProgress(DocumentPart):
    """unfinished.json: a pass that goes on when the same command is given again."""

    kind: Literal["quantkit sensitivity, unfinished"] = "quantkit sensitivity, unfinished"
    job: FisherJob
    forward: Count = 0
    """Layers that the hidden states have passed."""
    backward: Count = 0
    """Layers, from the last, that the gradient has passed."""
    linears: dict[str, LinearFisher] = Field(default_factory=dict)
    """Of these layers."""


def read_sensitivity(folder: Path) -> SensitivityDocument:
    """The document of a finished pass. Raises `OutputError` or `SourceError` in one line for a folder that holds none,
    for an unfinished pass, and for a damaged file."""
    path = folder / SENSITIVITY
    if not path.is_file():
        raise OutputError(
            f"{folder}: holds no {SENSITIVITY}.",
            hint="Give the folder that `quantkit sensitivity SOURCE -o FOLDER` finished.",
        )
    return parsed_document(path, document_bytes(path), SensitivityDocument)
