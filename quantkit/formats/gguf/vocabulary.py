"""The tokenizer of a checkpoint as the key-values that llama.cpp reads: byte-level BPE ("gpt2" to llama.cpp) only.

In: a folder with tokenizer.json and, where they exist, tokenizer_config.json, chat_template.jinja, config.json and
generation_config.json. Out: ``tokenizer.ggml.*`` and ``tokenizer.chat_template``. What llama.cpp would tokenise
otherwise than the checkpoint does is refused here, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from quantkit.errors import SourceError
from quantkit.formats.gguf.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from quantkit.formats.gguf.values import Value, array, boolean, string, strings, u32
from quantkit.formats.safetensors.header import parse_json_object
from quantkit.formats.tiktoken_model import TIKTOKEN, as_tokenizer_json, tokenizer_file, tokenizer_settings

MAX_TOKENIZER_BYTES = 1 << 26
MAX_TEXT_BYTES = 1 << 24
"""Largest of the small files that is read. The largest tokenizer.json of a released model is some 35 MB."""

_MISSING_HINT = "A GGUF file holds the tokenizer: add the checkpoint's own files."

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""enum llama_token_type."""

SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Entry of tokenizer_config.json -> middle of ``tokenizer.ggml.<x>_token_id``."""


@dataclass(frozen=True, slots=True)
class _AddedToken:
    id: int
    text: str
    type: int


def vocabulary(folder: Path, vocab_size: int, *, pre: str | None = None) -> dict[str, Value]:
    """The key-values of the checkpoint's tokenizer, ids up to ``vocab_size`` (config.json's).

    ``pre``: the name of rules that are not recognised in tokenizer.json, and must not contradict those that are.
    Raises SourceError: a file missing, malformed or too large; not byte-level BPE; an unknown pre-tokenizer; ids that
    are taken twice or beyond ``vocab_size``; anything that llama.cpp's tokenizer has no place for.
    """
    path, tokenizer, settings = _read_tokenizer(folder)
    model = _bpe_model(path, tokenizer)
    entries, added = _token_ids(path, model), _added_tokens(path, tokenizer)
    _check_added_ids(path, entries, added)
    texts, types = _tokens(path, entries, added, vocab_size)
    ids = {text: token for token, text in enumerate(texts)}
    values = {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(_pre_name(path, tokenizer, pre)),
        "tokenizer.ggml.tokens": strings(texts),
        "tokenizer.ggml.token_type": array("i32", types),
        "tokenizer.ggml.merges": strings(_merges(path, model, ids)),
        **_special_values(folder, tokenizer, settings, ids, vocab_size),
    }
    template = _chat_template(folder, settings)
    return values if template is None else values | {"tokenizer.chat_template": string(template)}


def token_texts(folder: Path, vocab_size: int) -> list[str]:
    """The text of each id as a GGUF file of the checkpoint lists it. Raises `SourceError` as `vocabulary` does."""
    path, tokenizer, _ = _read_tokenizer(folder)
    entries, added = _token_ids(path, _bpe_model(path, tokenizer)), _added_tokens(path, tokenizer)
    return _tokens(path, entries, added, vocab_size)[0]


def _read_tokenizer(folder: Path) -> tuple[Path, Mapping[str, Any], Mapping[str, Any]]:
    """File of the tokenizer, its content, and that of tokenizer_config.json."""
    path = tokenizer_file(folder)
    if path.name == TIKTOKEN:
        return path, as_tokenizer_json(folder), tokenizer_settings(folder)
    return path, _read_json(path, MAX_TOKENIZER_BYTES), _read_optional(folder / "tokenizer_config.json")


# --------------------------------------------------------------------------------------------------------- the model


def _bpe_model(path: Path, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    model = _mapping(path, tokenizer.get("model"), "model")
    rules = pre_tokenizer(tokenizer)
    fault = ""
    if model.get("type", "BPE") != "BPE":
        fault = f"model.type is {_excerpt(model['type'])}"
    elif not any(step[0] == "ByteLevel" for step in rules.steps):
        fault = "pre_tokenizer has no ByteLevel step"
    elif flag := next((key for key in ("byte_fallback", "fuse_unk", "dropout", "unk_token") if model.get(key)), None):
        fault = f"model.{flag} is {_excerpt(model[flag])}"
    elif affix := next((key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)), None):
        fault = f"model.{affix} is {_excerpt(model[affix])}"
    if fault:
        raise SourceError(
            f"{path}: {fault}, but GGUF files are written for byte-level BPE tokenizers only.",
            hint="Choose another output format for this model.",
        )
    return model


def _token_ids(path: Path, model: Mapping[str, Any]) -> dict[str, int]:
    entries = _mapping(path, model.get("vocab"), "model.vocab")
    for text, token in entries.items():
        if type(token) is not int or token < 0:
            raise _malformed(path, f"model.vocab gives {_excerpt(text)} the id {_excerpt(token)}")
    return cast("dict[str, int]", entries)


def _added_tokens(path: Path, tokenizer: Mapping[str, Any]) -> list[_AddedToken]:
    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list):
        raise _malformed(path, f"added_tokens is {_excerpt(entries)}")
    added: list[_AddedToken] = []
    for entry in cast("list[object]", entries):
        token = _mapping(path, entry, "an entry of added_tokens")
        text, number = token.get("content"), token.get("id")
        if not isinstance(text, str) or not text or type(number) is not int or number < 0:
            raise _malformed(path, f"added_tokens holds {_excerpt(token)}")
        if flag := next((key for key in ("single_word", "lstrip", "rstrip") if token.get(key)), None):
            raise SourceError(f"{path}: the added token {_excerpt(text)} has {flag}, which llama.cpp does not know.")
        is_control = bool(token.get("special")) or _looks_special(text)
        added.append(_AddedToken(number, text, CONTROL if is_control else USER_DEFINED))
    return added


def _check_added_ids(path: Path, entries: Mapping[str, int], added: Sequence[_AddedToken]) -> None:
    """The tokenizers library, and so the model's training, numbers added tokens on from the vocabulary's size and does
    not look at the ids in the file."""
    free = len(entries)
    for token in added:
        expected = entries.get(token.text, free)
        if token.id != expected:
            raise _malformed(
                path,
                f"the added token {_excerpt(token.text)} has the id {_excerpt(token.id)}, but is the id {expected} to "
                "the tokenizers library",
            )
        free = max(free, expected + 1)


def _looks_special(text: str) -> bool:
    """DeepSeek marks the tokens of its chats as not special; as control tokens user input cannot spell them out."""
    return any(text.startswith(head) and text.endswith(tail) for head, tail in (("<|", "|>"), ("<｜", "｜>")))


def _tokens(
    path: Path, entries: Mapping[str, int], added: Sequence[_AddedToken], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Text and type of each id; ids that no token has are filled up with "[PADi]" of type UNUSED."""
    texts: dict[int, str] = {}
    types = [UNUSED] * vocab_size
    pairs = [(text, number, NORMAL) for text, number in entries.items()]
    pairs += [(token.text, token.id, token.type) for token in added]
    for text, number, kind in pairs:
        if number >= vocab_size:
            raise SourceError(
                f"{path}: gives {_excerpt(text)} the id {_excerpt(number)}, but config.json has vocab_size "
                f"{vocab_size}.",
                hint="The tokenizer belongs to another model.",
            )
        if texts.setdefault(number, text) != text:
            raise _malformed(path, f"the id {number} stands for {_excerpt(texts[number])} and for {_excerpt(text)}")
        types[number] = kind
    filled = [texts.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    _check_texts(path, filled)
    return filled, types


def _check_texts(path: Path, texts: Sequence[str]) -> None:
    """llama.cpp looks tokens up by their text, which it reads as C strings."""
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise _malformed(path, f"{_excerpt(text)} has two ids")
        if not text or "\0" in text or text.encode(errors="ignore").decode() != text:
            raise _malformed(path, f"the token {_excerpt(text)} is empty or no text")
        seen.add(text)


def _merges(path: Path, model: Mapping[str, Any], ids: Mapping[str, int]) -> list[str]:
    """Pairs in order of rank, "a b". tokenizer.json has them as such strings, or, since 2024, as lists of two."""
    entries = model.get("merges")
    if not isinstance(entries, list):
        raise _malformed(path, f"model.merges is {_excerpt(entries)}")
    merges: list[str] = []
    for entry in cast("list[object]", entries):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        pair = cast("list[object]", parts) if isinstance(parts, list) else []
        left, right = pair if len(pair) == 2 else (None, None)
        if not (isinstance(left, str) and isinstance(right, str) and {left, right, left + right} <= ids.keys()):
            raise _malformed(path, f"model.merges holds {_excerpt(entry)}, needed two tokens that make a third")
        if " " in left or " " in right:
            raise _malformed(path, f"model.merges holds {_excerpt(entry)}, byte-level tokens have no spaces")
        merges.append(f"{left} {right}")
    if len(set(merges)) != len(merges):
        raise _malformed(path, "model.merges holds a pair twice")
    return merges


# ------------------------------------------------------------------------------------------------- the pre-tokenizer


def _pre_name(path: Path, tokenizer: Mapping[str, Any], wanted: str | None) -> str:
    """The name of the rules in tokenizer.json, or ``wanted`` for rules that have none here."""
    options = ", ".join(PRE_TOKENIZERS)
    if wanted is not None and wanted not in PRE_TOKENIZERS:
        raise SourceError(f"pre: found {_excerpt(wanted)}, needed one of: {options}.")
    found = pre_tokenizer(tokenizer)
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == found), None)
    if name is not None and wanted not in (None, name):
        raise SourceError(
            f"{path}: cuts text by the rules of {name}, but the recipe says pre: {wanted}.",
            hint="Leave `pre:` out: llama.cpp would cut words that the model never saw.",
        )
    if name is None and wanted is None:
        kinds = _excerpt(" ".join(str(step[0]) for step in (*found.normalizer, *found.steps)))
        raise SourceError(
            f"{path}: its normalizer and pre_tokenizer ({kinds}) are none that quantkit knows llama.cpp's name of.",
            hint=f"If you know it, set `pre:` in the recipe to one of: {options}.",
        )
    return name or str(wanted)


# ---------------------------------------------------------------------------------------- special tokens and template


def _special_values(
    folder: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int], vocab_size: int
) -> dict[str, Value]:
    """Without an EOS, or a BOS that is to be added, llama.cpp would take the id 11 of GPT-2's vocabulary."""
    found: dict[str, int] = {}
    for entry, name in SPECIAL_KEYS.items():
        number = _special_id(folder, entry, settings, ids, vocab_size)
        if number is not None:
            found[name] = number
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = "bos" in found and _template_starts_with(tokenizer, found["bos"], ids)
    missing = [name for name, needed in (("BOS", add_bos), ("EOS", True)) if needed and name.lower() not in found]
    if missing:
        raise SourceError(
            f"{folder}: no {missing[0]} token is named in tokenizer_config.json or config.json, llama.cpp needs one."
        )
    found |= _turn_endings(folder, ids, found["eos"])
    return {
        **{f"tokenizer.ggml.{name}_token_id": u32(number) for name, number in found.items()},
        "tokenizer.ggml.add_bos_token": boolean(add_bos),
        "tokenizer.ggml.add_eos_token": boolean(settings.get("add_eos_token") is True),
    }


def _special_id(
    folder: Path, entry: str, settings: Mapping[str, Any], ids: Mapping[str, int], vocab_size: int
) -> int | None:
    """Id of a special token: by its text in tokenizer_config.json (null: there is none), else by the number in
    config.json or generation_config.json; the first of several."""
    if entry in settings:
        text = settings[entry]
        if isinstance(text, dict):
            text = cast("dict[str, object]", text).get("content")
        if text is None:
            return None
        if not isinstance(text, str) or text not in ids:
            raise SourceError(
                f"{folder / 'tokenizer_config.json'}: {entry} is {_excerpt(text)}, a token that tokenizer.json lacks."
            )
        return ids[text]
    for path in (folder / "config.json", folder / "generation_config.json"):
        number = _read_optional(path).get(f"{entry}_id")
        if isinstance(number, list):
            number = next(iter(cast("list[object]", number)), None)
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < vocab_size:
            raise SourceError(f"{path}: {entry}_id is {_excerpt(number)}, needed an id below {vocab_size}.")
        return number
    return None


def _turn_endings(folder: Path, ids: Mapping[str, int], eos: int) -> dict[str, int]:
    """Where generation ends besides EOS, by generation_config.json: GLM's <|user|> and <|observation|>, which llama.cpp
    knows by no text. It has two names more, the end of a turn and of a message, and does the same at both."""
    listed = _read_optional(folder / "generation_config.json").get("eos_token_id")
    numbers = cast("list[object]", listed) if isinstance(listed, list) else []
    known = set(ids.values())
    others = [number for number in numbers if type(number) is int and number in known and number != eos]
    return dict(zip(("eot", "eom"), others, strict=False))


def _template_starts_with(tokenizer: Mapping[str, Any], bos: int, ids: Mapping[str, int]) -> bool:
    """Whether the post-processor puts BOS first where tokenizer_config.json does not say."""
    part = tokenizer.get("post_processor")
    processors: list[object] = [part]
    if isinstance(part, dict) and isinstance(inner := cast("dict[str, object]", part).get("processors"), list):
        processors = cast("list[object]", inner)
    for processor in processors:
        match processor:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(text)}}, *_]}:
                return ids.get(text) == bos
            case _:
                continue
    return False


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja goes before tokenizer_config.json; of several named templates `default` counts."""
    path = folder / "chat_template.jinja"
    if path.exists():
        template: object = _read_text(path, MAX_TEXT_BYTES)
    else:
        path = folder / "tokenizer_config.json"
        template = settings.get("chat_template")
    if isinstance(template, list):
        named = [cast("dict[str, object]", item) for item in cast("list[object]", template) if isinstance(item, dict)]
        template = next((item.get("template") for item in named if item.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    if "\0" in template or template.encode(errors="ignore").decode() != template:
        raise _malformed(path, "the chat template is no text")
    return template


# ------------------------------------------------------------------------------------------------------------- files


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_json(path, MAX_TEXT_BYTES) if path.exists() else {}


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    return parse_json_object(_read_text(path, limit).encode(), str(path))


def _read_text(path: Path, limit: int) -> str:
    try:
        if not path.is_file():
            raise SourceError(f"{path}: is missing or no file.", hint=_MISSING_HINT)
        if (size := path.stat().st_size) > limit:
            raise SourceError(f"{path}: has {size:,} bytes, at most {limit:,} are read.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise _malformed(path, "it is not UTF-8") from error


def _mapping(path: Path, value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(path, f"{what} is {_excerpt(value)}, needed an object")
    return cast("dict[str, Any]", value)


def _malformed(path: Path, fault: str) -> SourceError:
    return SourceError(f"{path}: {fault}.", hint="Download the file again: it is damaged or was edited.")


def _excerpt(value: object) -> str:
    """A value for a message: at most some 60 characters, in one line."""
    text = ascii(value) if not isinstance(value, (dict, list)) else type(cast("object", value)).__name__
    return text if len(text) <= 60 else text[:57] + "..."
