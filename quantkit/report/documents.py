"""quantkit.json and evaluation.json, as far as a report needs them. They may come from strangers and from other
versions: unknown keys are skipped, missing ones have defaults where a report can do without, and whatever else is
wrong is refused in one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from quantkit.errors import OutputError
from quantkit.formats.safetensors.header import printable

CONVERSION, EVALUATION = "quantkit.json", "evaluation.json"
MAX_BYTES = 256 * 2**20
"""Of a document. DeepSeek V3's quantkit.json has 10 MB."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""How many: no file makes an integer that is too large for a float."""
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""NaN where the file says null: the standard error of a single window."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Mean(_Part):
    """A value and its standard error."""

    mean: Number
    standard_error: Number = math.nan


# ---------------------------------------------------------------------------------------------------------- conversion


class RoleSize(_Part):
    """Tensors of one role, stored one way; dropped ones have no bytes."""

    role: str
    stored_as: str
    tensors: Count
    parameters: Count
    nbytes: Count


class Linear(_Part):
    """A quantised linear, or one whose scheme the source had already (without loss)."""

    scheme: dict[str, JsonValue]
    relative_loss: Number | None = None
    n_tokens: Count = 0
    fallback: str = ""


class CalibrationFile(_Part):
    """Text that a conversion was calibrated with. ``rows``: token sequences taken."""

    file: str
    sha256: str
    documents: Count
    tokens: Count
    rows: Count


class ValidationScores(_Part):
    """The conversion's own measurement."""

    windows: Count
    tokens: Count
    reference_perplexity: Mean
    candidate_perplexity: Mean
    perplexity_ratio: Mean
    mean_kl: Mean
    median_kl: Number
    p99_kl: Number
    top1: Mean


class Validation(_Part):
    """Scores, and the recipe's limits that they exceed."""

    scores: ValidationScores
    problems: tuple[str, ...] = ()


ExpertCount = tuple[Count, Number, Count]
"""Tokens that chose the expert, the sum of their gate weights, tokens borrowed."""


class Conversion(_Part):
    """quantkit.json."""

    quantkit: str
    job: dict[str, JsonValue]
    recipe: dict[str, JsonValue]
    source: str = ""
    output: str
    validated: bool | None = None
    validation: Validation | None = None
    tensor_bytes: Count
    bpw: Number
    contents: tuple[RoleSize, ...] = ()
    calibration: tuple[CalibrationFile, ...] = ()
    expert_tokens: dict[Count, dict[str, tuple[ExpertCount, ...]]] = Field(default_factory=dict)
    tensors: dict[str, Linear]
    sha256: dict[str, str] = Field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------- evaluation


class Divergence(_Part):
    """KLD, nats per token. ``histogram``: tokens below 1e-7, in quarters of powers of ten up to 100, and above."""

    mean: Number
    standard_error: Number
    median: Number
    p90: Number
    p99: Number
    p999: Number
    max: Number
    histogram: tuple[Count, ...] | None = None


class Scores(_Part):
    """A candidate against its reference."""

    windows: Count
    tokens: Count
    reference_perplexity: Mean
    perplexity: Mean
    log_ratio: Mean
    kld: Divergence
    same_top: Mean
    rms_probability_change: Mean


class Layer(_Part):
    """A candidate behind one decoder layer. ``expert_errors``: the hidden error over each routed expert's
    tokens."""

    layer: Count
    hidden_error: Number
    router_agreement: Number | None = None
    expert_tokens: tuple[Count, ...] | None = None
    expert_errors: tuple[Number, ...] | None = None


class Result(_Part):
    """All scores of a candidate."""

    overall: Scores
    domains: dict[str, Scores] = Field(default_factory=dict)
    layers: tuple[Layer, ...] = ()


class Model(_Part):
    """A checkpoint that was read."""

    name: str
    path: str
    format: str
    fingerprint: str = ""
    weights: Count
    nbytes: Count
    notes: tuple[str, ...] = ()

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights if self.weights else math.nan


class Candidate(_Part):
    """A checkpoint and its scores."""

    model: Model
    result: Result


class NoiseFloor(_Part):
    """The reference against itself, rounded."""

    rounding: str = ""
    result: Result


class Protocol(_Part):
    """How text was cut and what was scored."""

    name: str
    description: str = ""
    context: Count
    max_windows_per_file: Count | None = None


class Text(_Part):
    """A file of text."""

    file: str
    sha256: str
    tokens: Count
    windows: Count


class ReferenceFile(_Part):
    """What stood for the reference: a file with the ``top`` most likely tokens of each position. ``kld``: what that
    means for the divergences."""

    path: str
    top: Count
    kld: str = ""
    mean_rest: Number = math.nan


class Evaluation(_Part):
    """evaluation.json, versions 1 and 2."""

    versions: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    arithmetic: str = ""
    protocol: Protocol
    text: tuple[Text, ...] = ()
    tokens_sha256: str = ""
    reference: Model
    reference_file: ReferenceFile | None = None
    noise_floor: NoiseFloor | None = None
    candidates: tuple[Candidate, ...]


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Found:
    """A document and the file it was read from. ``written``: when that file was last changed, UTC."""

    path: Path
    document: Conversion | Evaluation
    written: datetime


class _Kind(_Part):
    kind: JsonValue = None
    quantkit: JsonValue = None


def read_documents(paths: Iterable[Path]) -> tuple[Found, ...]:
    """The documents of output folders (their quantkit.json, or those of their subfolders when a conversion made
    several outputs, and evaluation.json if one lies there) and of JSON files. Each once, in the order given.

    Raises `OutputError` for a path that holds none and for a file that cannot be read as one.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _files(path):
            files.setdefault(file.resolve(), file)
    return tuple(_read(file) for file in files.values())


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise OutputError(f"{path}: not found.", hint="Give output folders of `quantkit convert` or JSON documents.")
    folders = [path] if (path / CONVERSION).is_file() else sorted(p for p in path.iterdir() if p.is_dir())
    conversions = [folder / CONVERSION for folder in folders if (folder / CONVERSION).is_file()]
    evaluations = [file for file in (path / EVALUATION,) if file.is_file()]
    if not conversions and not evaluations:
        raise OutputError(
            f"{path}: holds no {CONVERSION}, nor do its subfolders, and no {EVALUATION}.",
            hint="Give an output folder of `quantkit convert`, or the file that `quantkit evaluate -o` wrote.",
        )
    yield from (*conversions, *evaluations)


def _read(path: Path) -> Found:
    try:
        status = path.stat()
        if status.st_size > MAX_BYTES:
            raise OutputError(f"{path}: {status.st_size:,} bytes, a report's documents have at most {MAX_BYTES:,}.")
        content = path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}.") from error
    kind = _parsed(path, content, _Kind)
    if kind.kind == "quantkit evaluation":
        document: Conversion | Evaluation = _parsed(path, content, Evaluation)
    elif isinstance(kind.quantkit, str):
        document = _parsed(path, content, Conversion)
    else:
        raise OutputError(
            f"{path}: is neither a conversion's {CONVERSION} nor an evaluation.",
            hint="`quantkit convert` and `quantkit evaluate -o FILE` write what a report is made of.",
        )
    return Found(path, document, datetime.fromtimestamp(status.st_mtime, timezone.utc))


_Model = TypeVar("_Model", bound=BaseModel)


def _parsed(path: Path, content: bytes, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = printable(".".join(str(part)[:60] for part in first["loc"][:8]))
        raise OutputError(
            f"{path}: {f'{place}: ' if place else ''}{first['msg'][:200]}.",
            hint="The file is damaged, or was written by a version of quantkit that this one does not know.",
        ) from error
