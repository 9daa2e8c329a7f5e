"""What `evaluate` opens and checks before torch is loaded: the reference (a folder, or the file of its statistics),
the candidates, the text cut into windows."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import Cut, TokenRows, eval_windows
from quantkit.calibrate.documents import find_files, read_documents
from quantkit.documents.evaluation import ScoringProtocol
from quantkit.documents.reference import ReferenceRecord
from quantkit.errors import CalibrationError, ConfigError, PlanError, SourceError
from quantkit.evaluate.open import Evaluated, open_candidate, open_reference, tokenizer_sha256
from quantkit.evaluate.reference_file import ReferenceStatistics, is_reference_file
from quantkit.formats.preallocated import check_place
from quantkit.formats.storage import LOCAL, Storage
from quantkit.plan.lengths import check_length

DEFAULT_TEXT = ("builtin:eval",)
DEFAULT_CONTEXT = 512
_PROTOCOLS: dict[Cut, str] = {
    "windows": "BOS and the next context - 1 tokens of a file, without overlap; every token but BOS is scored.",
    "llama.cpp": "As llama-perplexity: the text with BOS in front in chunks of context tokens, BOS in place of each "
    "chunk's first; tokens from context / 2 + 1 on are scored.",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller wants of text and protocol; None: nothing in particular. ``base_dir``: where relative names of text
    files count from."""

    text: Sequence[str] | None = None
    context: int | None = None
    max_windows_per_file: int | None = None
    protocol: Cut | None = None
    base_dir: Path = Path()


@dataclass(frozen=True, slots=True)
class AgainstFolder:
    """The reference is open and goes through the layers beside the candidates. ``save``: where to keep its statistics.
    ``tokenizer``: sha256 of its tokenizer.json. ``seconds``: wall time that opening took."""

    original: Evaluated
    candidates: tuple[Evaluated, ...]
    protocol: ScoringProtocol
    windows: TokenRows
    tokenizer: str | None
    save: Path | None
    seconds: float


@dataclass(frozen=True, slots=True)
class AgainstFile:
    """The reference is what an earlier run kept of it, of a model ``arch``. ``seconds``: wall time that opening
    took."""

    reference: ReferenceStatistics
    arch: ModelArch
    candidates: tuple[Evaluated, ...]
    seconds: float


@contextmanager
def prepared(
    reference: Path, candidates: Sequence[Path], asked: Asked, save: Path | None, storage: Storage = LOCAL
) -> Generator[AgainstFolder | AgainstFile]:
    """Open all models and cut the text. ``save``: where to keep the reference's statistics; ``storage``:
    opens shards.

    Loads no torch (but for the tokens of a reference's file). Raises a `QuantkitError` with one line for a path, a
    text or a protocol that cannot be used.
    """
    if not candidates and save is None:
        raise PlanError("evaluate: no candidate was given.", hint="Give candidates, or a file to save_reference.")
    from_file = is_reference_file(reference)
    if from_file and save is not None:
        raise PlanError(f"{reference}: is a reference's file already.", hint="Leave --save-reference out.")
    for path in candidates:
        if not path.exists():
            raise SourceError(f"{path}: does not exist.", hint="Give checkpoints that exist after the reference.")
    with ExitStack() as stack:
        if from_file:
            yield _against_file(stack, reference, candidates, asked, storage)
        else:
            yield _against_folder(stack, reference, candidates, asked, save, storage)


def _against_folder(
    stack: ExitStack, path: Path, candidates: Sequence[Path], asked: Asked, save: Path | None, storage: Storage
) -> AgainstFolder:
    start = time.monotonic()
    context = DEFAULT_CONTEXT if asked.context is None else asked.context
    protocol = _protocol(asked.protocol or "windows", context, asked.max_windows_per_file)
    if save is not None:
        check_place(save)
    original = stack.enter_context(open_reference(path, storage))
    check_length("--context", context, original.arch)
    tokenizer = tokenizer_sha256(path)
    others = _open(stack, candidates, original.arch, tokenizer, storage)
    windows = eval_windows(
        asked.text or DEFAULT_TEXT, context, path, asked.base_dir, protocol.max_windows_per_file, protocol.name
    )
    return AgainstFolder(original, others, protocol, windows, tokenizer, save, time.monotonic() - start)


def _against_file(
    stack: ExitStack, path: Path, candidates: Sequence[Path], asked: Asked, storage: Storage
) -> AgainstFile:
    start = time.monotonic()
    reference = stack.enter_context(ReferenceStatistics(path))
    record = reference.record
    _require_asked(path, record, asked)
    try:
        arch = arch_of(record.config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
    if arch.vocab_size != record.vocab_size:
        raise SourceError(f"{path}: its record names two sizes of the vocabulary.")
    check_length(f"{path}: context", record.protocol.context, arch)
    others = _open(stack, candidates, arch, record.tokenizer_sha256, storage)
    return AgainstFile(reference, arch, others, time.monotonic() - start)


def _open(
    stack: ExitStack, candidates: Sequence[Path], arch: ModelArch, tokenizer: str | None, storage: Storage
) -> tuple[Evaluated, ...]:
    return tuple(stack.enter_context(open_candidate(path, arch, tokenizer, storage)) for path in candidates)


def _protocol(name: Cut, context: int, max_windows_per_file: int | None) -> ScoringProtocol:
    if name not in _PROTOCOLS:
        raise PlanError(f"evaluation: protocol is {name!r}, {' or '.join(_PROTOCOLS)} was needed.")
    first_scored = context // 2 if name == "llama.cpp" else 0
    if max_windows_per_file is not None and max_windows_per_file < 1:
        raise CalibrationError(f"evaluation: found max_windows_per_file {max_windows_per_file}, needed at least 1.")
    if context - 1 - first_scored < 1:
        raise CalibrationError(f"evaluation: context {context} leaves nothing to score by protocol {name}.")
    return ScoringProtocol(
        name=name,
        description=_PROTOCOLS[name],
        context=context,
        max_windows_per_file=max_windows_per_file,
        scored_per_window=context - 1 - first_scored,
    )


def _require_asked(path: Path, record: ReferenceRecord, asked: Asked) -> None:
    """Raise `SourceError` if the file holds another text or protocol than was asked for."""
    protocol = record.protocol
    for what, found, wanted in (
        ("--protocol", protocol.name, asked.protocol),
        ("--context", protocol.context, asked.context),
        ("--max-windows-per-file", protocol.max_windows_per_file, asked.max_windows_per_file),
    ):
        if wanted is not None and found != wanted:
            kept = "without" if found is None else f"with {what} {found}, not"
            raise SourceError(
                f"{path}: was made {kept} {what} {wanted}.",
                hint="Leave the option out, or save the reference again with it.",
            )
    if asked.text is None:
        return
    hashes = [read_documents(file)[0] for file in find_files(asked.text, asked.base_dir)]
    if hashes != [text.sha256 for text in record.text]:
        raise SourceError(
            f"{path}: was made of other text: {', '.join(text.file for text in record.text)}.",
            hint="Leave --text out, or save the reference again with it.",
        )
