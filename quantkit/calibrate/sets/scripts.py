"""Which script a text is written in, by its letters: Latin, Han, Cyrillic... Scripts, not languages: English, French
and German are all Latin, so texts that are to be balanced against each other belong into files, or domains, of their
own.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

NO_LETTERS = "none"
"""Of texts such as tables of numbers."""
LATIN = "Latin"
_SAMPLE = 256
"""Characters, evenly spread over a text, that are looked at."""
_NAMES = {
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "HALFWIDTH": "Kana",
    "FULLWIDTH": LATIN,
    "MATHEMATICAL": LATIN,
}
"""Where the first word of a character's name in Unicode is not its script."""


def script_of(text: str) -> str:
    """The script of most letters of ``text``, or `NO_LETTERS`."""
    sample = text[:: len(text) // _SAMPLE + 1]
    if sample.isascii():  # the common case, without looking up names
        return LATIN if any(map(str.isalpha, sample)) else NO_LETTERS
    counts: Counter[str] = Counter()
    for character, n_times in Counter(sample).items():
        if character.isalpha():
            counts[_script(character)] += n_times
    return max(counts, key=lambda script: (counts[script], script), default=NO_LETTERS)


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    """The first word of a letter's name in Unicode, "LATIN SMALL LETTER A", is its script."""
    word = unicodedata.name(letter, "OTHER").split()[0]
    return _NAMES.get(word, word.capitalize())
