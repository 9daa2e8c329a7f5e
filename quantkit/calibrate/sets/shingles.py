"""Texts that are nearly the same: runs of words (shingles) as hashes, and what two texts have in common of them.

Words are runs of letters and digits in lower case; of Han and kana, which have no spaces, each character is one. Near
duplicates: the Jaccard similarity of the sets of runs of 5 words, estimated from the 64 smallest hashes of each text
(bottom-k sketch: Broder, "On the resemblance and containment of documents", 1997). Texts that must not be in the set:
any common run of 13 words, as Brown et al. 2020 (arXiv 2005.14165, appendix C) look for test text in training text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR_RUN, EXCLUDED_RUN = 5, 13
SKETCH = 64
NEAR = 0.7
"""Similarity from which a text is a near duplicate of another. The standard error of the estimate is 0.06."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, bits well mixed
_MIX = 0xBF58476D1CE4E5B9  # of splitmix64


def words_of(text: str) -> NDArray[np.uint64]:
    """A hash of each word, (n,) uint64 from 1 to 2**32. The same on every machine."""
    import numpy as np

    hashes = [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())]
    return np.array(hashes, dtype=np.uint64) + np.uint64(1)


def shingles(words: NDArray[np.uint64], run: int) -> NDArray[np.uint64]:
    """Hashes of all runs of ``run`` of the words (n,), sorted, each once; of fewer words the hash of all of them, and
    (0,) of none."""
    import numpy as np

    run = min(run, words.size)
    runs = np.zeros(words.size - run + 1 if words.size else 0, dtype=np.uint64)
    for place in range(run):
        runs = runs * np.uint64(_MULTIPLIER) + words[place : place + runs.size]
    # Of a product the low bits depend on few bits: without this step the smallest hashes would not be a random choice.
    runs ^= runs >> np.uint64(31)
    runs *= np.uint64(_MIX)
    return np.unique(runs ^ (runs >> np.uint64(29)))


def sketch_of(words: NDArray[np.uint64]) -> tuple[int, ...]:
    """The `SKETCH` smallest shingles of a text, ascending."""
    return tuple(shingles(words, NEAR_RUN)[:SKETCH].tolist())


def similarity(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Estimate of the Jaccard similarity of two texts from their sketches; 0 of texts without words."""
    first, second = set(one), set(other)
    smallest = sorted(first | second)[:SKETCH]
    return sum(value in first and value in second for value in smallest) / max(1, len(smallest))


class ExcludedText:
    """Texts that no document may share a run of words with. Takes 8 bytes a word."""

    def __init__(self, texts: Iterable[str]) -> None:
        import numpy as np

        parts = [np.zeros(0, dtype=np.uint64), *(shingles(words_of(text), EXCLUDED_RUN) for text in texts)]
        self._hashes = np.unique(np.concatenate(parts))

    def shares(self, words: NDArray[np.uint64]) -> bool:
        """Whether a text has a run of `EXCLUDED_RUN` words in common with them, or is as a whole a shorter one."""
        import numpy as np

        wanted = shingles(words, EXCLUDED_RUN)
        places = np.minimum(np.searchsorted(self._hashes, wanted), max(0, self._hashes.size - 1))
        return self._hashes.size > 0 and bool((self._hashes[places] == wanted).any())
