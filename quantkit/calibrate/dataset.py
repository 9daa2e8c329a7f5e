"""Calibration and evaluation text -> rows of token ids.

Enters: the recipe's `calibration` settings (or its validation text) and the checkpoint's tokenizer. Leaves: TokenRows.

Packing. A file's documents are joined (documents.py, tokenizer.py) and tokenised. A row is BOS + the next
sequence_length - 1 tokens of one file (sequence_length tokens where the model has no BOS). No row crosses files, and
rows do not overlap.

Choice of calibration rows. ceil(tokens / sequence_length) rows are taken round-robin over the files: one of each file,
then a second of each, and so on; a file that has no more whole row is passed over. The k rows of a file are stratified:
the file is cut into k equal parts and a row starts at a place within each part that the seed decides. The place is
derived by SHA-256 from the seed, the file's content and the row's number, so it depends neither on the machine nor on
where the file lies.

Choice of evaluation windows. Whole chunks of context - 1 tokens (the rest of the file is left out), all of them or k
evenly spread: chunk numbers unique(int(linspace(0, n - 1, k))). llama.cpp's perplexity tool cuts otherwise: the text
with BOS in front into chunks of context tokens, and BOS in place of each chunk's first token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from quantkit.calibrate.counts import TokenCount
from quantkit.calibrate.documents import TextFile, find_files, read_documents
from quantkit.calibrate.repetition import repetition_warning
from quantkit.calibrate.tokenizer import CheckpointTokenizer, load_tokenizer
from quantkit.errors import CalibrationError
from quantkit.formats.tiktoken_model import tokenizer_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Cut = Literal["windows", "llama.cpp"]
"""How evaluation text is cut into windows."""


class Calibration(BaseModel):
    """The recipe's `calibration` settings: which text, how much of it, in rows of what length."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """`builtin:NAME`, files and globs of .txt, .jsonl and .parquet; relative names count from the recipe's folder."""
    tokens: TokenCount
    """Tokens to calibrate with, BOS included, such as 131072, 64k, 512Ki or 1e5; rounded up to whole rows."""
    sequence_length: Annotated[int, Field(ge=2, strict=True)]
    """Tokens of a row, BOS included."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Decides where in the files the rows begin."""
    min_expert_tokens: Annotated[int, Field(ge=0, strict=True)] = 128
    """An expert that fewer tokens chose borrows, for its statistics, those that came nearest to choosing it."""


@dataclass(frozen=True, slots=True)
class FileProvenance:
    """Where rows came from. `tokens` counts the whole file without BOS, `rows` what was taken of it."""

    file: str
    sha256: str
    documents: int
    tokens: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """tokens (n_rows, sequence_length) int32; the domain (file stem) of each row; one provenance entry per file.

    `warnings`: one line for each thing that makes the rows doubtful, but not unusable.
    """

    tokens: NDArray[np.int32]
    domains: tuple[str, ...]
    provenance: tuple[FileProvenance, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _TokenisedFile:
    file: TextFile
    provenance: FileProvenance
    ids: NDArray[np.int32]  # (n_tokens,)


def token_rows(settings: Calibration, checkpoint_dir: Path, base_dir: Path) -> TokenRows:
    """Calibration rows as the module's docstring defines them; the same for the same text, tokenizer and settings.

    Relative names in `settings.data` count from `base_dir`. Raises CalibrationError: text or tokenizer unusable (one
    line that names file and line), or fewer tokens in the text than asked for.
    """
    tokenizer = load_tokenizer(checkpoint_dir)
    files = _tokenise(settings.data, tokenizer, base_dir)
    length = settings.sequence_length
    body = length - (tokenizer.bos_id is not None)
    available = [file.ids.size // body for file in files]
    _check_enough(settings, sum(available))
    counts = _round_robin(available, -(-settings.tokens // length))
    starts = [_stratified_starts(file, n_rows, body, settings.seed) for file, n_rows in zip(files, counts, strict=True)]
    order = sorted((turn, place) for place, n_rows in enumerate(counts) for turn in range(n_rows))
    rows = _rows(files, [(place, starts[place][turn]) for turn, place in order], length, tokenizer.bos_id)
    warning = repetition_warning(rows.tokens, tokenizer.tokenizer)
    return rows if warning is None else replace(rows, warnings=(warning,))


def eval_windows(
    text: Sequence[str],
    context: int,
    checkpoint_dir: Path,
    base_dir: Path,
    max_windows_per_file: int | None = None,
    cut: Cut = "windows",
) -> TokenRows:
    """Windows of `context` tokens for perplexity and KL divergence, file after file.

    All whole windows of each file, or at most `max_windows_per_file`, evenly spread. Raises CalibrationError: text or
    tokenizer unusable, a file shorter than one window.
    """
    import numpy as np

    if context < 2:
        raise CalibrationError(f"evaluation: found context {context}, needed at least 2 tokens.")
    if max_windows_per_file is not None and max_windows_per_file < 1:
        raise CalibrationError(f"evaluation: found max_windows_per_file {max_windows_per_file}, needed at least 1.")
    tokenizer = load_tokenizer(checkpoint_dir)
    files = _tokenise(text, tokenizer, base_dir)
    head = int(tokenizer.bos_id is not None)
    body = context - head
    # llama-perplexity: the BOS of the text counts as its first token, and a chunk's first token is lost to its own BOS.
    stride, before = (context, head) if cut == "llama.cpp" else (body, 0)
    chosen: list[tuple[int, int]] = []
    for place, file in enumerate(files):
        n_chunks = (before + file.ids.size) // stride
        if n_chunks == 0:
            raise _too_short(file.file, file.ids.size, body)
        wanted = n_chunks if max_windows_per_file is None else min(max_windows_per_file, n_chunks)
        chunks = np.unique(np.linspace(0, n_chunks - 1, wanted).astype(np.int64))
        chosen.extend((place, int(chunk) * stride) for chunk in chunks)
    return _rows(files, chosen, context, tokenizer.bos_id)


def check_text(data: Calibration | Sequence[str], checkpoint_dir: Path, base_dir: Path, context: int = 2) -> None:
    """Raise the CalibrationError that `token_rows` would raise of ``data``, or `eval_windows` of files and ``context``.

    Tokenises no more than is needed to know that there is enough text. Where the checkpoint has no tokenizer.json, only
    the files themselves are checked.
    """
    calibration = data if isinstance(data, Calibration) else None
    files = find_files(data.data if isinstance(data, Calibration) else data, base_dir)
    if not tokenizer_file(checkpoint_dir).exists():
        for file in files:
            read_documents(file)
        return
    tokenizer = load_tokenizer(checkpoint_dir)
    body = (context if calibration is None else calibration.sequence_length) - (tokenizer.bos_id is not None)
    n_rows = 0
    for file in files:
        missing = 1 if calibration is None else -(-calibration.tokens // calibration.sequence_length) - n_rows
        n_tokens = _count(file, tokenizer, max(missing, 1) * body)
        if calibration is None and n_tokens < body:
            raise _too_short(file, n_tokens, body)
        n_rows += n_tokens // body
    if calibration is not None:
        _check_enough(calibration, n_rows)


def _count(file: TextFile, tokenizer: CheckpointTokenizer, enough: int) -> int:
    """Tokens of the file, or ``enough`` or more of them."""
    n_tokens = 0
    for ids in tokenizer.portions(file.label, read_documents(file)[1]):
        n_tokens += ids.size
        if n_tokens >= enough:
            break
    return n_tokens


def _check_enough(settings: Calibration, n_rows: int) -> None:
    length = settings.sequence_length
    if n_rows * length < settings.tokens:
        raise CalibrationError(
            f"calibration: {settings.tokens:,} tokens were asked for, the text holds {n_rows * length:,} in whole rows "
            f"of {length:,}.",
            hint="Give more text, or lower `tokens` or `sequence_length`.",
        )


def _too_short(file: TextFile, n_tokens: int, needed: int) -> CalibrationError:
    return CalibrationError(
        f"{file.label}: holds {n_tokens:,} tokens, one window needs {needed:,}.",
        hint="Give more text, or lower `context`.",
    )


def _tokenise(entries: Sequence[str], tokenizer: CheckpointTokenizer, base_dir: Path) -> list[_TokenisedFile]:
    files: list[_TokenisedFile] = []
    for file in find_files(entries, base_dir):
        sha256, documents = read_documents(file)
        ids = tokenizer.encode(file.label, documents)
        provenance = FileProvenance(file.label, sha256, len(documents), ids.size, rows=0)
        files.append(_TokenisedFile(file, provenance, ids))
    return files


def _round_robin(available: Sequence[int], n_rows: int) -> list[int]:
    """How many rows each file gives when each gives one in turn until `n_rows` are together."""
    counts = [0] * len(available)
    missing = n_rows
    while missing:
        open_files = [place for place, count in enumerate(counts) if count < available[place]]
        for place in open_files[:missing]:
            counts[place] += 1
        missing -= min(missing, len(open_files))
    return counts


def _stratified_starts(file: _TokenisedFile, n_rows: int, body: int, seed: int) -> list[int]:
    """Where each of the file's rows starts: one in each of n_rows equal parts, so that they cannot overlap."""
    starts: list[int] = []
    for row in range(n_rows):
        begin, end = (file.ids.size * row // n_rows, file.ids.size * (row + 1) // n_rows)
        key = f"{seed}:{file.provenance.sha256}:{row}".encode()
        draw = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")  # uniform in [0, 2**64)
        starts.append(begin + (draw * (end - body - begin + 1) >> 64))
    return starts


def _rows(
    files: Sequence[_TokenisedFile], chosen: Sequence[tuple[int, int]], length: int, bos_id: int | None
) -> TokenRows:
    """The rows that begin at `chosen` = (number of the file, first token), in that order."""
    import numpy as np

    head = 0 if bos_id is None else 1
    tokens = np.empty((len(chosen), length), dtype=np.int32)
    tokens[:, :head] = bos_id or 0
    taken = [0] * len(files)
    for row, (place, start) in enumerate(chosen):
        tokens[row, head:] = files[place].ids[start : start + length - head]
        taken[place] += 1
    domains = tuple(files[place].file.domain for place, _ in chosen)
    provenance = tuple(replace(file.provenance, rows=n_rows) for file, n_rows in zip(files, taken, strict=True))
    return TokenRows(tokens, domains, provenance)
