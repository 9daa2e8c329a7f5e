"""The checkpoint's own tokenizer: documents -> token ids.

Enters: a checkpoint folder's tokenizer.json, tokenizer_config.json, config.json and chat_template.jinja. Leaves: ids of
a whole file. No special token is added by the tokenizer itself: the packing puts BOS where it belongs, at the head of
each row.

BOS: `add_bos_token` of tokenizer_config.json decides where it is given; otherwise a model with a BOS token gets it. The
token is `bos_token` of tokenizer_config.json, else `bos_token_id` of config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantkit.calibrate.chat_template import TemplateFailure, render_chats
from quantkit.calibrate.documents import ChatDocument, Document, TextDocument, encodable
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
BETWEEN_TEXTS = "\n\n"
BATCH_CHARACTERS = 1 << 22  # an encoding keeps offsets and strings, some 100 bytes a token: encode in portions


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """What turns text into this checkpoint's token ids. `bos_id` is None for a model whose text begins without BOS."""

    tokenizer: Tokenizer
    bos_id: int | None
    vocab_size: int
    special_tokens: Mapping[str, str]
    chat_template: str | None

    def encode(self, label: str, documents: Sequence[Document]) -> NDArray[np.int32]:
        """Ids of a file's documents, one after another: (n_tokens,) int32.

        A text is followed by a blank line when another document comes after it. A chat is rendered by the chat
        template; the BOS that the template writes at its head is dropped, since a served model sees BOS only at
        position 0. Raises CalibrationError: no or a failing template, ids outside the vocabulary.
        """
        import numpy as np

        texts = self._texts(documents)
        pieces: list[NDArray[np.int32]] = []
        for batch in _batches(texts):
            encodings = self.tokenizer.encode_batch(batch, add_special_tokens=False)
            pieces.extend(np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings)
        ids = np.concatenate(pieces)
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise CalibrationError(
                f"{label}: tokenizer.json gives id {int(ids.max())}, but config.json has vocab_size {self.vocab_size}.",
                hint="The tokenizer belongs to another model.",
            )
        return ids

    def _texts(self, documents: Sequence[Document]) -> list[str]:
        chats = iter(self._render([document for document in documents if isinstance(document, ChatDocument)]))
        texts = [next(chats) if isinstance(document, ChatDocument) else document.text for document in documents]
        for place, document in enumerate(documents[:-1]):
            if isinstance(document, TextDocument):
                texts[place] += BETWEEN_TEXTS
        return texts

    def _render(self, chats: Sequence[ChatDocument]) -> list[str]:
        if not chats:
            return []
        if self.chat_template is None:
            raise CalibrationError(
                f"{chats[0].where}: holds chat messages, but the checkpoint has no chat template.",
                hint="Add chat_template.jinja to the checkpoint, or give the data as `text`.",
            )
        try:
            texts = render_chats(self.chat_template, [chat.messages for chat in chats], self.special_tokens)
        except TemplateFailure as failure:
            where = chats[failure.index or 0].where
            raise CalibrationError(f"{where}: the checkpoint's chat template failed: {failure}.") from failure
        bos = self.special_tokens.get("bos_token", "")
        return [encodable(chat.where, text.removeprefix(bos)) for chat, text in zip(chats, texts, strict=True)]


def load_tokenizer(checkpoint_dir: Path) -> CheckpointTokenizer:
    """Raises CalibrationError: tokenizer.json missing or unreadable, contradictions about BOS, no vocab_size."""
    tokenizer = _read_tokenizer(checkpoint_dir / "tokenizer.json")
    config = _read_json(checkpoint_dir / "config.json", required=True)
    tokenizer_config = _read_json(checkpoint_dir / "tokenizer_config.json", required=False)
    special = {name: text for name in SPECIAL_TOKENS if (text := _token_text(tokenizer_config.get(name))) is not None}
    vocab_size = config.get("vocab_size")
    if type(vocab_size) is not int:
        raise CalibrationError(f"{checkpoint_dir / 'config.json'}: found vocab_size {vocab_size!r}, needed a number.")
    bos_id = _bos_id(tokenizer, tokenizer_config, config, special.get("bos_token"))
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise CalibrationError(f"{checkpoint_dir}: BOS has id {bos_id}, but config.json has vocab_size {vocab_size}.")
    if bos_id is not None and "bos_token" not in special and (text := tokenizer.id_to_token(bos_id)):
        special["bos_token"] = text
    return CheckpointTokenizer(tokenizer, bos_id, vocab_size, special, _chat_template(checkpoint_dir, tokenizer_config))


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    text = _read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the tokenizers package raises nothing narrower
        raise CalibrationError(f"{path}: is no tokenizer ({str(error).splitlines()[0]}).") from error
    # Both may be switched on inside tokenizer.json, and would cut or fill up every document.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(
            f"{path}: cannot be read ({error.strerror}).", hint="Calibration needs the checkpoint's tokenizer files."
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: is not UTF-8.") from error


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        content: object = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CalibrationError(f"{path}: found {type(content).__name__}, needed a JSON object.")
    return cast("dict[str, Any]", content)


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
            raise CalibrationError(f"tokenizer_config.json names the BOS token {bos_token!r}, tokenizer.json lacks it.")
    elif tokenizer_config.get("bos_token", "absent") is None and wanted is not True:
        return None  # `"bos_token": null` says that there is none, whatever id config.json holds
    if known is None and wanted is True:
        raise CalibrationError("tokenizer_config.json asks for a BOS token (add_bos_token), but none is named.")
    return known


def _chat_template(checkpoint_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The file chat_template.jinja goes before tokenizer_config.json; of several named templates `default` counts."""
    path = checkpoint_dir / "chat_template.jinja"
    if path.exists():
        return _read_text(path)
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = [cast("dict[str, object]", item) for item in cast("list[object]", template) if isinstance(item, dict)]
        template = next((item.get("template") for item in named if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
