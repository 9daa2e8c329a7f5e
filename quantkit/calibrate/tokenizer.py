"""The checkpoint's own tokenizer: documents -> token ids.

Enters: a checkpoint folder's tokenizer.json (or tiktoken.model), tokenizer_config.json, config.json and
chat_template.jinja. Leaves: ids of a whole file. No special token is added by the tokenizer itself: the packing puts
BOS where it belongs, at the head of each row.

BOS: `add_bos_token` of tokenizer_config.json decides where it is given; otherwise a model with a BOS token gets it. The
token is `bos_token` of tokenizer_config.json, else `bos_token_id` of config.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from quantkit.calibrate.chat_template import TemplateFailure, render_chats
from quantkit.calibrate.chats import ChatDocument, encodable
from quantkit.calibrate.documents import Document, FileText, TextDocument, samples_of
from quantkit.calibrate.pieces import WINDOW, TextReader, read_ids
from quantkit.calibrate.round_trip import SAMPLE_CHARACTERS, SAMPLES, check_round_trip
from quantkit.errors import CalibrationError, SourceError
from quantkit.formats.safetensors.header import check_json_size, printable
from quantkit.formats.safetensors.reader import read_small
from quantkit.formats.source import language_config
from quantkit.formats.tiktoken_model import TIKTOKEN, as_tokenizer_json, tokenizer_file, tokenizer_settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

BETWEEN_TEXTS = "\n\n"
BATCH_CHARACTERS = 1 << 18  # an encoding keeps offsets and strings, some 250 bytes a token: encode in portions
CHATS_AT_ONCE = 4096  # are rendered by one child process
IDS_IN_MEMORY = 1 << 25  # bytes of a file's ids; more of them go to a temporary file
MAX_VOCABULARY = 1 << 31  # ids are int32


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """What turns text into this checkpoint's token ids. `bos_id` is None for a model whose text begins without BOS."""

    tokenizer: Tokenizer
    bos_id: int | None
    vocab_size: int
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]

    def encode(self, label: str, documents: Sequence[Document]) -> NDArray[np.int32]:
        """Ids of a file's documents, one after another: (n_tokens,) int32.

        A text is followed by a blank line when another document comes after it. A chat is rendered by the chat
        template; the BOS that the template writes at its head is dropped, since a served model sees BOS only at
        position 0. Raises CalibrationError: no or a failing template, ids outside the vocabulary, a tokenizer that
        loses text.
        """
        import numpy as np

        with tempfile.SpooledTemporaryFile(max_size=IDS_IN_MEMORY) as spool:
            for portion in self.portions(label, documents):
                _write(label, spool, portion.astype(np.int32).tobytes())
            n_bytes = spool.tell()
            spool.seek(0)
            ids = spool.read() if n_bytes <= IDS_IN_MEMORY else mmap(spool.fileno(), n_bytes, access=ACCESS_READ)
        return np.frombuffer(ids, dtype=np.int32)

    def portions(self, label: str, documents: Sequence[Document]) -> Iterator[NDArray[np.int64]]:
        """The ids of `encode`, (n,) int64 at a time, for readers that need not know all of them."""
        check_round_trip(self.tokenizer, label, samples_of(documents, SAMPLES, SAMPLE_CHARACTERS))
        for ids in self._encoded(documents):
            if ids.size and int(ids.max()) >= self.vocab_size:
                raise CalibrationError(
                    f"{label}: tokenizer.json gives id {int(ids.max())}, but config.json has vocab_size "
                    f"{self.vocab_size}.",
                    hint="The tokenizer belongs to another model.",
                )
            yield ids

    def _encoded(self, documents: Sequence[Document]) -> Iterator[NDArray[np.int64]]:
        import numpy as np

        for batch in _batches(self._texts(documents)):
            if isinstance(batch, list):
                encodings = self.tokenizer.encode_batch(batch, add_special_tokens=False)
                yield from (np.array(encoding.ids, dtype=np.int64) for encoding in encodings)
            elif isinstance(batch, FileText):
                with batch.open() as reader:
                    yield from read_ids(self.tokenizer, reader)
            else:
                yield from read_ids(self.tokenizer, TextReader(batch))

    def _texts(self, documents: Sequence[Document]) -> Iterator[str | FileText]:
        chats = self._rendered([document for document in documents if isinstance(document, ChatDocument)])
        for number, document in enumerate(documents, start=1):
            match document:
                case ChatDocument():
                    yield next(chats)
                case TextDocument():
                    yield document.text + BETWEEN_TEXTS if number < len(documents) else document.text
                case FileText():
                    yield document

    def _rendered(self, chats: Sequence[ChatDocument]) -> Iterator[str]:
        if chats and "default" not in self.chat_templates:
            raise CalibrationError(
                f"{chats[0].where}: holds chat messages, but the checkpoint has no chat template.",
                hint="Add chat_template.jinja to the checkpoint, or give the data as `text`.",
            )
        for begin in range(0, len(chats), CHATS_AT_ONCE):
            yield from self._render(chats[begin : begin + CHATS_AT_ONCE])

    def _render(self, chats: Sequence[ChatDocument]) -> list[str]:
        try:
            texts = render_chats(self.chat_templates, chats, self.special_tokens)
        except TemplateFailure as failure:
            where = chats[failure.index or 0].where
            problem = printable(str(failure), 300)
            raise CalibrationError(f"{where}: the checkpoint's chat template failed: {problem}.") from failure
        bos = self.special_tokens.get("bos_token", "")
        return [encodable(chat.where, text.removeprefix(bos)) for chat, text in zip(chats, texts, strict=True)]


def _write(label: str, spool: IO[bytes], content: bytes) -> None:
    try:
        spool.write(content)
    except OSError as error:
        raise CalibrationError(
            f"{label}: its token ids, 4 bytes each, find no room in {tempfile.gettempdir()} ({error.strerror}).",
            hint="Set TMPDIR to a folder with more room.",
        ) from error


def load_tokenizer(checkpoint_dir: Path) -> CheckpointTokenizer:
    """Raises CalibrationError: tokenizer.json missing or unreadable, contradictions about BOS, no vocab_size."""
    tokenizer = _read_tokenizer(tokenizer_file(checkpoint_dir))
    config = _read_json(checkpoint_dir / "config.json", required=True)
    tokenizer_config = _read_json(checkpoint_dir / "tokenizer_config.json", required=False)
    if tokenizer_file(checkpoint_dir).name == TIKTOKEN:
        tokenizer_config = tokenizer_settings(checkpoint_dir)
    special = {
        name: text
        for name, value in tokenizer_config.items()
        if name.endswith("_token") and (text := _token_text(value)) is not None
    }
    config = {**config, **language_config(config)}
    vocab_size = _vocab_size(checkpoint_dir / "config.json", config.get("vocab_size"))
    bos_id = _bos_id(tokenizer, tokenizer_config, config, special.get("bos_token"))
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise CalibrationError(f"{checkpoint_dir}: BOS has id {bos_id}, but config.json has vocab_size {vocab_size}.")
    if bos_id is not None and "bos_token" not in special and (text := tokenizer.id_to_token(bos_id)):
        special["bos_token"] = text
    templates = _chat_templates(checkpoint_dir, tokenizer_config)
    return CheckpointTokenizer(tokenizer, bos_id, vocab_size, special, templates)


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    text = _made_text(path.parent) if path.name == TIKTOKEN else _read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the tokenizers package raises nothing narrower
        raise CalibrationError(f"{path}: is no tokenizer ({printable(str(error))}).") from error
    # Both may be switched on inside tokenizer.json, and would cut or fill up every document.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _made_text(folder: Path) -> str:
    try:
        return json.dumps(as_tokenizer_json(folder))
    except SourceError as error:
        raise CalibrationError(error.message, hint=error.hint) from error


def _read_text(path: Path) -> str:
    """Raises CalibrationError also for a file that would fill the memory."""
    try:
        raw = read_small(path)
        check_json_size(raw, str(path))
        return raw.decode("utf-8")
    except SourceError as error:
        raise CalibrationError(error.message, hint="Calibration needs the checkpoint's tokenizer files.") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: is not UTF-8.") from error


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        content: object = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: is not JSON ({printable(str(error))}).") from error
    if not isinstance(content, dict):
        raise CalibrationError(f"{path}: found {type(content).__name__}, needed a JSON object.")
    return cast("dict[str, Any]", content)


def _vocab_size(path: Path, value: object) -> int:
    if type(value) is not int:
        raise CalibrationError(f"{path}: found vocab_size {printable(repr(value), 60)}, needed a number.")
    if value > MAX_VOCABULARY:
        found = printable(f"{value:,}", 60)
        raise CalibrationError(f"{path}: found vocab_size {found}, at most {MAX_VOCABULARY:,} was needed.")
    return value


def _token_text(value: object) -> str | None:
    """A special token is written as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None


def _bos_id(
    tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], bos_token: str | None
) -> int | None:
    wanted: object = tokenizer_config.get("add_bos_token")
    if wanted is False:
        return None
    from_config = config.get("bos_token_id")
    known = from_config if type(from_config) is int else None
    if bos_token is not None:
        encodable = bos_token.encode(errors="ignore").decode() == bos_token  # half a surrogate pair is in no vocabulary
        known = tokenizer.token_to_id(bos_token) if encodable else None
        if known is None:
            named = printable(repr(bos_token), 80)
            raise CalibrationError(f"tokenizer_config.json names the BOS token {named}, tokenizer.json lacks it.")
    elif tokenizer_config.get("bos_token", "absent") is None and wanted is not True:
        return None  # `"bos_token": null` says that there is none, whatever id config.json holds
    if known is None and wanted is True:
        raise CalibrationError("tokenizer_config.json asks for a BOS token (add_bos_token), but none is named.")
    return known


def _chat_templates(checkpoint_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, `default` for the only one. The file chat_template.jinja goes before tokenizer_config.json."""
    path = checkpoint_dir / "chat_template.jinja"
    if path.exists():
        more = sorted((checkpoint_dir / "additional_chat_templates").glob("*.jinja"))
        return {"default": _read_text(path)} | {extra.stem: _read_text(extra) for extra in more}
    given: object = tokenizer_config.get("chat_template")
    items = cast("list[object]", given) if isinstance(given, list) else [{"name": "default", "template": given}]
    named = [cast("dict[str, object]", item) for item in items if isinstance(item, dict)]
    pairs = [(item.get("name"), item.get("template")) for item in named]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _batches(texts: Iterator[str | FileText]) -> Iterator[list[str] | str | FileText]:
    """Short texts in lists, which are tokenised at once; a long one alone."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        alone = isinstance(text, FileText) or len(text) > WINDOW
        if batch and (alone or characters >= BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        if isinstance(text, FileText) or alone:
            yield text
        else:
            batch.append(text)
            characters += len(text)
    if batch:
        yield batch
