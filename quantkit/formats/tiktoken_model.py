"""The tokenizer of a folder that has ``tiktoken.model`` and no tokenizer.json, as Kimi K2 is released.

In: that file and tokenizer_config.json. Out: what tokenizer.json would hold, for the tokenizers library and for GGUF.

The file holds the ranked byte strings of a BPE, one a line: base64, a space, the rank, which is the token's id. How
text is cut into words, and which ids behind the last rank are special, stands in Python code beside it, which is not
run: Kimi's is known here, other kinds are refused. Unlike tokenizer.json the format has no list of merges; every split
of a token into two others is one, in the order of the token's rank, and a word that is a token stays whole. The tests
compare ids with those of the tiktoken package.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import parse_json_object
from quantkit.formats.safetensors.reader import read_small

TOKENIZER, TIKTOKEN = "tokenizer.json", "tiktoken.model"
SETTINGS = "tokenizer_config.json"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_WORDS = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Kimi's rules, as tokenization_kimi.py spells them (``pat_str``)."""
_RESERVED = 256
"""Special tokens behind the last rank, named by tokenizer_config.json or by their id."""
_CODE, _CLASS = "tokenization_kimi", "TikTokenTokenizer"
_LONGEST = 1024  # bytes of a token: all its splits are looked up; Kimi's longest are some 130
_HINT = "Download the file again: it is damaged or was edited."


def tokenizer_file(folder: Path) -> Path:
    """The file that turns text into ids: tokenizer.json, or tiktoken.model where that stands alone."""
    usual, other = folder / TOKENIZER, folder / TIKTOKEN
    return other if other.exists() and not usual.exists() else usual


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, {} without one. Kimi's adds no BOS, which its code says and not this file."""
    path = folder / SETTINGS
    found = parse_json_object(read_small(path), str(path)) if path.exists() else {}
    return {"add_bos_token": False, **found} if tokenizer_file(folder).name == TIKTOKEN else found


def as_tokenizer_json(folder: Path) -> dict[str, Any]:
    """What tokenizer.json would hold. Raises `SourceError`: damaged, or another model's than Kimi's."""
    settings = tokenizer_settings(folder)
    if not _is_kimi(settings):
        raise SourceError(
            f"{folder / TIKTOKEN}: holds tokens but no rules that cut text, and {SETTINGS} names none that quantkit "
            f"knows ({_CLASS} of {_CODE}.py, Kimi's).",
            hint=f"Add a {TOKENIZER}: transformers makes one of a tokenizer that it loads (save_pretrained).",
        )
    ranks = _ranks(folder / TIKTOKEN)
    split = {"type": "Split", "pattern": {"Regex": KIMI_WORDS}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    letters = _letters()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_special_tokens(settings, len(ranks))),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {texts[token]: rank for token, rank in ranks.items()},
            "merges": list(_merges(ranks, texts)),
        },
    }


def _is_kimi(settings: Mapping[str, Any]) -> bool:
    return settings.get("tokenizer_class") == _CLASS or _CODE in str(settings.get("auto_map"))


def _ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, in order of rank. Every byte is a token, and ranks count from 0 without a gap."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_small(path).splitlines(), start=1):
        if not line.strip():
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= _LONGEST or token in ranks or rank.strip() != str(len(ranks)).encode():
            found = ascii(line[:40].decode("latin-1"))
            raise SourceError(
                f"{path}: line {number} is {found}, needed a new token in base64 and the rank {len(ranks)}.", hint=_HINT
            )
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise SourceError(f"{path}: has no token for {len(missing)} of the 256 bytes.", hint=_HINT)
    return ranks


def _letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself if it is printable in Latin-1, else the next
    of those from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def _merges(ranks: Mapping[bytes, int], texts: Mapping[bytes, str]) -> Iterator[list[str]]:
    """Two tokens that make a third, in the order of the third's rank; among its own, in that of their ranks."""
    for token in ranks:
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        for left, right in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            yield [texts[left], texts[right]]


def _special_tokens(settings: Mapping[str, Any], first: int) -> Iterator[dict[str, object]]:
    listed = settings.get("added_tokens_decoder")
    known = cast("dict[str, object]", listed) if isinstance(listed, dict) else {}
    for number in range(first, first + _RESERVED):
        entry = known.get(str(number))
        token = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
        content = token.get("content")
        yield {
            "id": number,
            "content": content if isinstance(content, str) and content else f"<|reserved_token_{number}|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(token.get("special", True)),
        }
