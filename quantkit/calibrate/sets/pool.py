"""The documents that a calibration set is drawn from: a bounded number of them, whatever passes by.

Each document has a key, a hash of the seed and its content: uniform, and equal for equal documents. A stratum is a
domain and a script. `draw` takes from the domain that has the fewest tokens so far, in it from the script with the
fewest, the document with the smallest key. As more documents come, a stratum is never drawn from deeper than before,
so what `draw` leaves behind can be forgotten, and with it all larger keys of the stratum. Exact duplicates need no list
of all documents seen: equal keys are kept, or refused, together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from quantkit.calibrate.sets.shingles import NEAR, similarity

ROOM = 2
"""A trimmed pool holds so many times the tokens that are wanted: near duplicates may still leave it."""
FULL = 3
"""It is trimmed when it holds so many times the tokens."""
_INDEXED = 8
"""Of a sketch so many values are looked up. Texts of similarity 0.7 share one of them but for 1 pair in 10,000."""
_COMPARED = 64
"""Most documents that one value is compared with: boilerplate that thousands share must not take quadratic time."""

Stratum = tuple[str, str]
"""Domain and script."""


@dataclass(frozen=True, slots=True)
class PooledDocument:
    """A document that may be drawn. `line`: as it is written, JSON in UTF-8; `sketch` of its text, ascending."""

    key: int
    stratum: Stratum
    n_tokens: int
    line: bytes
    sketch: tuple[int, ...]


@dataclass(slots=True)
class Duplicates:
    """Documents that were left out because the pool held the same, or nearly the same, at that time."""

    exact: int = 0
    near: int = 0


@dataclass(slots=True)
class Pool:
    """At most `FULL` times ``tokens`` tokens of documents, and one document more. ``n_tokens``: that it holds now."""

    tokens: int
    duplicates: Duplicates = field(default_factory=Duplicates)
    n_tokens: int = 0
    _held: dict[int, PooledDocument] = field(default_factory=dict[int, PooledDocument])
    _closed: dict[Stratum, int] = field(default_factory=dict[Stratum, int])
    _by_sketch: dict[int, list[int]] = field(default_factory=dict[int, list[int]])

    def wants(self, stratum: Stratum, key: int) -> bool:
        """Whether a document with this key could still be drawn; a duplicate is counted and not wanted."""
        if key in self._held:
            self.duplicates.exact += 1
            return False
        closed = self._closed.get(stratum)
        return closed is None or key < closed

    def add(self, candidate: PooledDocument) -> None:
        """Take a wanted document, unless it is nearly the same as one with a smaller key, which stays in its place."""
        twins = self._twins(candidate)
        if any(twin.key < candidate.key for twin in twins):
            self.duplicates.near += 1
            return
        for twin in twins:
            self.duplicates.near += 1
            self.n_tokens -= self._held.pop(twin.key).n_tokens
        self._hold(candidate)
        if self.n_tokens > FULL * self.tokens:
            self._trim()

    def draw(self, tokens: int) -> list[PooledDocument]:
        """Documents of ``tokens`` tokens or a little more, or all, in an order whose beginnings are balanced, too."""
        return draw(self._held.values(), tokens)[0]

    def _hold(self, candidate: PooledDocument) -> None:
        self._held[candidate.key] = candidate
        self.n_tokens += candidate.n_tokens
        for value in candidate.sketch[:_INDEXED]:
            self._by_sketch.setdefault(value, []).append(candidate.key)

    def _twins(self, candidate: PooledDocument) -> list[PooledDocument]:
        places = (self._by_sketch.get(value, ())[-_COMPARED:] for value in candidate.sketch[:_INDEXED])
        keys = dict.fromkeys(key for place in places for key in place if key in self._held)
        return [self._held[key] for key in keys if similarity(self._held[key].sketch, candidate.sketch) >= NEAR]

    def _trim(self) -> None:
        drawn, left = draw(self._held.values(), ROOM * self.tokens)
        for candidate in left:
            self._closed[candidate.stratum] = min(candidate.key, self._closed.get(candidate.stratum, candidate.key))
        self._held, self._by_sketch, self.n_tokens = {}, {}, 0
        for candidate in drawn:
            self._hold(candidate)


def draw(candidates: Iterable[PooledDocument], tokens: int) -> tuple[list[PooledDocument], list[PooledDocument]]:
    """(documents of ``tokens`` tokens or a little more, those that are left), as the module's docstring says."""
    waiting: dict[Stratum, list[PooledDocument]] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.key, reverse=True):
        waiting.setdefault(candidate.stratum, []).append(candidate)
    of_domain, of_stratum = Counter[str](), Counter[Stratum]()
    drawn: list[PooledDocument] = []
    while waiting and of_domain.total() < tokens:
        stratum = min(waiting, key=lambda stratum: (of_domain[stratum[0]], of_stratum[stratum], stratum))
        candidate = waiting[stratum].pop()
        drawn.append(candidate)
        of_domain[stratum[0]] += candidate.n_tokens
        of_stratum[stratum] += candidate.n_tokens
        if not waiting[stratum]:
            del waiting[stratum]
    return drawn, _flat(waiting.values())


def _flat(groups: Iterable[Sequence[PooledDocument]]) -> list[PooledDocument]:
    return [candidate for group in groups for candidate in group]
