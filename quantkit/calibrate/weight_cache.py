"""Float32 weights by name: read from a checkpoint when asked for, the latest kept for the next batch of rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor


class WeightCache:
    """The latest weights up to ``max_bytes``; one that is larger than that passes through unkept."""

    def __init__(self, read: Callable[[str], Tensor], max_bytes: int) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, name: str) -> Tensor:
        """The weight, which must not be written to."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        weight = self._read(name)
        if weight.nbytes <= self._max_bytes:
            self._kept[name] = weight
            self._bytes += weight.nbytes
        while self._bytes > self._max_bytes:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.nbytes
        return weight

    def forget(self) -> None:
        """Free everything."""
        self._kept.clear()
        self._bytes = 0
