"""Lines of OUT.partial/journal.jsonl: what the job is, then what it has finished. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter

from quantkit.documents.values import Count, DocumentPart, Number
from quantkit.formats.checksums import WrittenRange
from quantkit.formats.storage import FileState


class JobHeader(DocumentPart):
    """The first line: what a resumed job must have in common with the killed one, so that its bytes are the same.

    It is also the ``job`` of quantkit.json. Keys have spaces for underscores: "torch version". Every field has a
    default, and unknown keys are kept, because other versions state more or less.
    """

    model_config = ConfigDict(
        extra="allow", alias_generator=lambda name: name.replace("_", " "), populate_by_name=True
    )  # fmt: skip

    quantkit_version: str | None = None
    """With a digest of the package's source files."""
    torch_version: str | None = None
    recipe: str | None = None
    """sha256 of its JSON, but for ``validation`` and ``allow_zeros``, which change no byte of the weights."""
    source: str | None = None
    """sha256 over headers and config of the source checkpoint."""
    origin: str | None = None
    """Where a remote source came from, with its commit if it is of a hub; stated only then."""
    tokenizer: str | None = None
    """sha256 over the tokenizer's files and the chat template."""
    calibration_text: str | None = None
    """sha256 of all token ids; null without calibration."""
    imatrix: str | None = None
    """sha256 of the imatrix file that the recipe names."""
    sensitivity: str | None = None
    """sha256 of what the Fisher pass that the recipe names has found."""
    expert_scores: str | None = None
    """sha256 of the scores that the recipe prunes by, of an earlier output; stated only then."""
    device: str | None = None
    threads: Count | None = None
    memory_budget: Count | None = None
    """Bytes. Moves work between RAM and disk, and changes no byte of the result."""

    def facts(self) -> dict[str, object]:
        """Key -> value of all that was stated, as in the file."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def bytes_follow_from(self) -> dict[str, object]:
        """Those of `facts` that another job with the same bytes must share."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"memory_budget"})


class JournalHeader(JobHeader):
    """The first line of a journal: the job, and the state of its source's shards. That is this machine's matter, and
    not in quantkit.json."""

    source_files: dict[str, FileState] = Field(default_factory=dict)

    @property
    def job(self) -> JobHeader:
        """The job alone."""
        return JobHeader.model_validate(self.model_dump(exclude={"source_files"}, exclude_unset=True))


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A linear that an output quantised. ``output``: its number in the recipe; ``relative_loss``: squared error of its
    output on the calibration text (without text: of its weights), relative; ``n_tokens``: calibration tokens that it
    saw; ``fallback``: why it was not quantised as the recipe says, "" if it was; ``output_loss``: the squared error
    weighed by what it does to the model's loss, relative, of output-aware methods."""

    output: Count
    name: str
    relative_loss: Number
    n_tokens: Count
    fallback: str = ""
    output_loss: Number | None = None


class ExpertRecord(NamedTuple):
    """What the router gave a routed expert: calibration tokens, the sum of their gate weights, and tokens borrowed from
    other experts because there were too few. In a file a list of three numbers."""

    n_tokens: Count
    gate_weight: Number
    borrowed: Count


class TuningRecord(DocumentPart):
    """What tuning did to a layer. Losses: squared error of the layer's output on held-out calibration rows, relative to
    what the layer adds to its input."""

    loss_before: Number
    """As the methods left the layer."""
    loss_after: Number
    epoch: Count
    """After which the best state was found, and kept; 0: none was better, the methods' numbers are stored."""
    codes: Count
    """That could move."""
    codes_changed: Count


class OutsideEntry(DocumentPart):
    """The tensors outside the decoder layers are written: embeddings, final norm, head."""

    done: Literal["outside"] = "outside"
    tensors: tuple[TensorRecord, ...]
    written: tuple[tuple[WrittenRange, ...], ...] = ()
    """For each output: which bytes of its files, and their checksums."""


class LayerEntry(DocumentPart):
    """A decoder layer is written to every output."""

    done: Literal["layer"] = "layer"
    layer: Count
    saved: bool
    """Whether the hidden states that leave it are on the disk."""
    tensors: tuple[TensorRecord, ...]
    experts: dict[str, tuple[ExpertRecord, ...]]
    """By the name of the block of routed experts; empty without calibration."""
    written: tuple[tuple[WrittenRange, ...], ...] = ()
    """As in `OutsideEntry`."""
    tuning: TuningRecord | None = None
    """Null where the layer was not tuned."""


JournalEntry = Annotated[OutsideEntry | LayerEntry, Field(discriminator="done")]
"""A line after the first."""
ENTRY: TypeAdapter[OutsideEntry | LayerEntry] = TypeAdapter(JournalEntry)
"""Reads a `JournalEntry`."""
