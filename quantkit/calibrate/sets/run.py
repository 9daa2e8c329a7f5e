"""The whole job: sources -> set and manifest on the disk.

Everything is read once, as a stream. The memory is that of some times the tokens that are asked for, of the excluded
text (8 bytes a word), and of one document.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.calibrate.sets.pool import Pool, PooledDocument, Stratum
from quantkit.calibrate.sets.scripts import script_of
from quantkit.calibrate.sets.shingles import ExcludedText, sketch_of, words_of
from quantkit.calibrate.sets.sources import BY_FILE, OnRead, Piece, Sources
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.documents.calibration_set import CalibrationSet, DomainTokens, LeftOut
from quantkit.errors import CalibrationError, OutputError
from quantkit.formats.preallocated import check_place, sha256_of, write_durably
from quantkit.formats.tiktoken_model import tokenizer_file

TOKENS = 524288
BYTES_PER_TOKEN = 4
"""The estimate where no tokenizer counts; English is near 4.5, Chinese near 4, code near 3 with a large vocabulary."""
SEQUENCE_LENGTH = 2048
"""Of the shipped recipes."""
LONG_CHAT = 16
"""A chat of more than one so many-th of all tokens is left out, unless it is no longer than a row."""
HELD_OUT = "builtin:eval"
"""What `evaluate` and the shorthand's validation measure with: always kept out."""
SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What is asked for. ``tokens``: at least so many; ``tokenizer``: folder of the checkpoint whose tokenizer counts,
    None to estimate; ``exclude``: entries of text that must not be in the set; ``domain_by``: "file", "folder" or a key
    of the rows; ``sequence_length``: tokens of a row in the recipe, longer texts are cut to about that."""

    tokens: int = TOKENS
    tokenizer: Path | None = None
    seed: int = 0
    exclude: tuple[str, ...] = ()
    domain_by: str = BY_FILE
    sequence_length: int = SEQUENCE_LENGTH


@dataclass(frozen=True, slots=True)
class _Counter:
    """How tokens are counted, and how the manifest says so."""

    count: Callable[[str], int]
    name: str
    sha256: str | None

    @classmethod
    def of(cls, model: Path | None) -> _Counter:
        """Raises `CalibrationError`: no usable tokenizer in the folder."""
        if model is None:
            return cls(lambda text: -(-len(text.encode()) // BYTES_PER_TOKEN), f"{BYTES_PER_TOKEN} bytes a token", None)
        tokenizer = load_tokenizer(model).tokenizer
        path = tokenizer_file(model)
        return cls(lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), path.name, sha256_of(path))


@dataclass(slots=True)
class _Selection:
    """Offers pieces to the pool, and counts what it never sees."""

    options: BuildOptions
    counter: _Counter
    kept_out: ExcludedText
    pool: Pool = field(init=False)
    excluded: int = 0
    long_chats: int = 0

    def __post_init__(self) -> None:
        self.pool = Pool(self.options.tokens)

    def offer(self, piece: Piece) -> None:
        """Take the piece if it can still be drawn. Only then it is tokenised and compared with others."""
        record = piece.record()
        stratum = piece.domain, script_of(piece.text)
        key = _key(self.options.seed, record)
        if not self.pool.wants(stratum, key):
            return
        words = words_of(piece.text)
        if self.kept_out.shares(words):
            self.excluded += 1
            return
        n_tokens = max(1, self.counter.count(piece.text))
        if piece.chat is not None and n_tokens > max(self.options.sequence_length, self.options.tokens // LONG_CHAT):
            self.long_chats += 1
            return
        line = json.dumps({**record, "domain": piece.domain}, ensure_ascii=False).encode() + b"\n"
        self.pool.add(PooledDocument(key, stratum, n_tokens, line, sketch_of(words)))


def build(
    entries: Sequence[str],
    out: Path,
    options: BuildOptions,
    base_dir: Path,
    *,
    replace: bool = False,
    on_read: OnRead | None = None,
) -> CalibrationSet:
    """Draw a set from the files that ``entries`` name, relative to ``base_dir``, and write it to ``out``, its manifest
    to `manifest_path`. ``replace``: files that are there already. ``on_read``: is told how much is read.

    The same files, options and seed give the same bytes. Where the sources hold fewer tokens than are asked for, the
    set has all of them: see ``is_short``. Raises `CalibrationError` for unusable text or options, `OutputError`.
    """
    if not entries:
        raise CalibrationError("No files were given, needed some that hold text.")
    sources = Sources.find(entries, base_dir, options.domain_by)
    held_out = Sources.find((HELD_OUT, *options.exclude), base_dir)
    _check_out(out, [file.path for file in (*sources.files, *held_out.files)], replace=replace)
    counter = _Counter.of(options.tokenizer)
    most_bytes = options.sequence_length * BYTES_PER_TOKEN
    selection = _Selection(options, counter, ExcludedText(piece.text for piece in held_out.pieces(most_bytes)))
    for piece in sources.pieces(most_bytes, on_read):
        selection.offer(piece)
    drawn = selection.pool.draw(options.tokens)
    if not drawn:
        raise CalibrationError(
            "Every document shares text with the files to be kept out, or is too long a chat.",
            hint="Give other text: calibration on what is evaluated would flatter the result.",
        )
    made = _manifest(out, drawn, selection, sources, held_out)
    write_durably(out, b"".join(candidate.line for candidate in drawn))
    write_durably(manifest_path(out), made.to_json().encode())
    return made


def manifest_path(out: Path) -> Path:
    """Where the manifest of a set lies."""
    return out.with_suffix(".manifest.json")


def _key(seed: int, record: dict[str, object]) -> int:
    """A number of 64 bits that the seed and the content decide, uniform."""
    content = json.dumps([seed, record], ensure_ascii=False, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _check_out(out: Path, read: Sequence[Path], *, replace: bool) -> None:
    if out.suffix != SUFFIX:
        raise OutputError(f"{out}: found {out.suffix or 'no extension'}, needed {SUFFIX}.")
    check_place(out)
    for path in (out, manifest_path(out)):
        if any(path.resolve() == source.resolve() for source in read):
            raise OutputError(f"{path}: is one of the files that are read.", hint="Give another -o.")
        if path.exists() and not replace:
            raise OutputError(f"{path}: exists already.", hint="Give another -o, or --force to replace it.")


def _manifest(
    out: Path, drawn: Sequence[PooledDocument], selection: _Selection, sources: Sources, held_out: Sources
) -> CalibrationSet:
    options, counter, duplicates = selection.options, selection.counter, selection.pool.duplicates
    digest = hashlib.sha256()
    for candidate in drawn:
        digest.update(candidate.line)
    return CalibrationSet(
        file=out.name,
        sha256=digest.hexdigest(),
        documents=len(drawn),
        tokens=sum(candidate.n_tokens for candidate in drawn),
        tokens_asked=options.tokens,
        counted_by=counter.name,
        tokenizer_sha256=counter.sha256,
        seed=options.seed,
        domain_by=options.domain_by,
        sequence_length=options.sequence_length,
        contents=_contents(drawn),
        left_out=LeftOut(
            exact_duplicates=duplicates.exact,
            near_duplicates=duplicates.near,
            excluded=selection.excluded,
            long_chats=selection.long_chats,
        ),
        sources=tuple(sources.read),
        excluded=tuple(held_out.read),
    )


def _contents(drawn: Sequence[PooledDocument]) -> tuple[DomainTokens, ...]:
    documents, tokens = Counter[Stratum](), Counter[Stratum]()
    for candidate in drawn:
        documents[candidate.stratum] += 1
        tokens[candidate.stratum] += candidate.n_tokens
    return tuple(
        DomainTokens(domain=domain, script=script, documents=documents[domain, script], tokens=tokens[domain, script])
        for domain, script in sorted(tokens)
    )
