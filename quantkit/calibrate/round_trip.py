"""Does the tokenizer keep the text? A sample of a file is encoded, decoded again, and compared by kinds of characters.

A tokenizer of a decoder gives back what it was given. One that was converted wrongly, or belongs to another model,
loses spaces, line ends, digits or whole scripts, and a model calibrated on what is left learns nothing of use. What
many sound tokenizers change is not counted: compatibility forms (NFKC), accents of Latin, Greek and Cyrillic letters,
upper and lower case, "\\r" before "\\n", control characters, spaces at the ends.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLES = 64
"""Texts that are taken of a file, each of at most SAMPLE_CHARACTERS."""
SAMPLE_CHARACTERS = 1024
_KIND_SHARE = 0.05  # of the characters of a kind, and
_TEXT_SHARE = 0.001  # of all characters: what a tokenizer may lose
_LEAST = 4
_FRAGMENTS = {
    "spaces": r"\S{1,8}\n?[^\S\r\n]{2,8}\S{1,8}|\S{1,8}[^\S\r\n]\S{1,8}",
    "line ends": r"[^\s]{1,8}\s{0,4}\n\s{0,4}[^\s]{1,8}",
    "digits": r"\d{1,8}",
}
_ANY_FRAGMENT = r"\S{1,12}"
_TRIES = 200


@dataclass(frozen=True, slots=True)
class _Loss:
    kind: str
    verb: str
    n_lost: int
    n_characters: int


def check_round_trip(tokenizer: Tokenizer, label: str, samples: Sequence[str]) -> None:
    """Raise CalibrationError that begins with ``label`` and names what is lost, with an example."""
    back = _decode(tokenizer, samples)
    loss = _worst(_characters(samples), _characters(back))
    if loss is None:
        return
    found = _example(tokenizer, samples, loss)
    example = "" if found is None else f": {found[0]!r} comes back as {found[1]!r}"
    raise CalibrationError(
        f"{label}: the checkpoint's tokenizer {loss.verb} {loss.kind}{example} ({loss.n_lost:,} of "
        f"{loss.n_characters:,} in a sample).",
        hint="Is tokenizer.json the model's own? Fetch it again; calibrating on such text would spoil the model.",
    )


def _decode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    if tokenizer.decoder is None and "ByteLevel" in str(tokenizer.pre_tokenizer):  # which decode() would not undo
        from tokenizers.decoders import ByteLevel

        return [ByteLevel().decode(encoding.tokens) for encoding in encodings]
    return tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)


def _characters(texts: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        plain = unicodedata.normalize("NFKD", text.strip(" ").replace("\r\n", "\n").casefold())
        counts.update(unicodedata.normalize("NFKD", plain.casefold()))
    return counts


def _worst(before: Counter[str], after: Counter[str]) -> _Loss | None:
    """The most frequent kind of characters among those that lose more than is tolerated."""
    total: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for character, count in before.items():
        if kind := _kind(character):
            total[kind] += count
            lost[kind] += max(0, count - after[character])
    losses = [_Loss(kind, "loses", lost[kind], total[kind]) for kind in total]
    n_spaces = sum(count for character, count in after.items() if _kind(character) == "spaces")
    losses.append(_Loss("spaces", "adds", n_spaces - total["spaces"], total["spaces"]))
    least = max(_LEAST, _TEXT_SHARE * total.total())
    beyond = [loss for loss in losses if loss.n_lost >= max(least, _KIND_SHARE * loss.n_characters)]
    return max(beyond, key=lambda loss: loss.n_lost, default=None)


def _kind(character: str) -> str:
    """What kind of character it is, "" for those that do not count."""
    if character == "\n":
        return "line ends"
    if character == "\t":
        return "spaces"
    category = unicodedata.category(character)
    if category == "Zs":
        return "spaces"
    if category[0] == "N":
        return "digits"
    if category[0] in "PS":
        return "punctuation and symbols"
    if category[0] in "LM" and not "\u0300" <= character <= "\u036f":
        script = unicodedata.name(character, "other").split()[0]
        return f"{script if script == 'CJK' else script.capitalize()} letters"
    return ""


def _example(tokenizer: Tokenizer, samples: Sequence[str], loss: _Loss) -> tuple[str, str] | None:
    """A short text of the samples, and what comes back of it."""
    pattern = re.compile(_FRAGMENTS.get(loss.kind, _ANY_FRAGMENT))
    found = (match.group() for text in samples for match in pattern.finditer(text))
    fragments = [text for text, _ in zip(found, range(_TRIES), strict=False)]
    if loss.kind.endswith("letters"):
        fragments = [text for text in fragments if any(_kind(character) == loss.kind for character in text)]
    for fragment, back in zip(fragments, _decode(tokenizer, fragments), strict=True):
        if _characters([fragment]) != _characters([back]):
            return fragment, back
    return None
