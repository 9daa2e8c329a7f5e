"""What the names in llama.cpp's list of pre-tokenizers stand for, and what a tokenizer.json has in their place.

A GGUF file stores no rules for cutting text into words, only a name (``tokenizer.ggml.pre``); the rules are compiled
into llama.cpp (llm_tokenizer_bpe of src/llama-vocab.cpp). Its converter guesses the name from a hash of the ids of a
probe text, so from the vocabulary. Here the normaliser and pre-tokenizer of tokenizer.json are compared instead, so
that any vocabulary with the same rules is recognised, and none without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from quantkit.formats.tiktoken_model import KIMI_WORDS

Step = tuple[str | bool, ...]
"""A normaliser or a step of a pre-tokenizer: its type, and what of its settings changes ids."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merges. ``ignore_merges``: a word that is a token stays whole, merges or not."""

    normalizer: tuple[Step, ...]
    steps: tuple[Step, ...]
    ignore_merges: bool = False


def _split(regex: str) -> Step:
    return ("Split", regex, "Isolated", False)


_BYTES_ONLY: Step = ("ByteLevel", False, False)
_LLAMA_WORDS = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS: Step = ("ByteLevel", False, True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "deepseek-v3": PreTokenizer(
        normalizer=(),
        steps=(
            _split(r"\p{N}{1,3}"),
            _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            _split(
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
                "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
                "| ?[\\p{P}\\p{S}]+[\r\n]*"
                "|\\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            _BYTES_ONLY,
        ),
    ),
    "llama-bpe": PreTokenizer(
        normalizer=(),
        steps=(_LLAMA_WORDS, _BYTES_ONLY),
        ignore_merges=True,
    ),
    "glm4": PreTokenizer(normalizer=(), steps=(_LLAMA_WORDS, _BYTES_ONLY)),
    "qwen2": PreTokenizer(normalizer=(("NFC", "?"),), steps=(_QWEN2_WORDS, _BYTES_ONLY)),
    "gpt-2": PreTokenizer(normalizer=(), steps=(_GPT2_WORDS,)),
    "kimi-k2": PreTokenizer(normalizer=(), steps=(_split(KIMI_WORDS), _BYTES_ONLY), ignore_merges=True),
}
"""By the name in ``tokenizer.ggml.pre``. Each was compared with llama.cpp, id for id; the tests do it again."""

DIFFERENCES = {
    "kimi-k2": "llama.cpp cuts text as Kimi's tokenizer does but for capitals inside words: it takes getUserName for "
    "one word, the model was trained on three.",
    "qwen2": "llama.cpp takes text as it is, Qwen's tokenizer composes it first (NFC): a letter and its accent that "
    "are two characters stay two.",
}
"""What llama.cpp cuts otherwise than the rules that a name stands for."""


def pre_tokenizer(tokenizer: Mapping[str, object]) -> PreTokenizer:
    """The rules of a tokenizer.json in comparable form. Never fails: what is unknown equals nothing in the list."""
    model = tokenizer.get("model")
    return PreTokenizer(
        normalizer=_steps(tokenizer.get("normalizer"), "normalizers"),
        steps=_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"),
        ignore_merges=isinstance(model, dict) and bool(cast("dict[str, object]", model).get("ignore_merges")),
    )


def _steps(part: object, list_key: str) -> tuple[Step, ...]:
    """null, one component, or a Sequence of them."""
    if part is None:
        return ()
    match part:
        case {"type": "Sequence"}:
            inner = cast("dict[str, object]", part).get(list_key)
            return tuple(_step(item) for item in cast("list[object]", inner)) if isinstance(inner, list) else (("?",),)
        case _:
            return (_step(part),)


def _step(component: object) -> Step:
    match component:
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": str(behavior)}:
            return ("Split", regex, behavior, bool(cast("dict[str, object]", component).get("invert")))
        case {"type": "ByteLevel"}:
            settings = cast("dict[str, object]", component)
            # Absent entries mean true, as in the tokenizers library.
            return ("ByteLevel", bool(settings.get("add_prefix_space", True)), bool(settings.get("use_regex", True)))
        case {"type": str(kind)}:
            return (kind, "?")
        case _:
            return ("?",)
