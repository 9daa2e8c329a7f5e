"""The weights of one layer on demand: original ones from the source, carried ones as the first output stores them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.quantizers.batch import QuantizedBatch
from quantkit.tensors import TensorSource


class LayerWeights:
    """Float32 weights by name for the two streams of a layer.

    Dense linears are asked for once a batch of rows, so the latest are kept up to ``cache_bytes``; experts are read once
    and pass by. Quantised linears are held as codes and decoded when asked for.
    """

    def __init__(self, source: TensorSource, *, carries_quantised: bool, cache_bytes: int, device: torch.device) -> None:
        self.carries_quantised = carries_quantised
        self._source = source
        self._device = device
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[str, bool], Tensor] = OrderedDict()
        self._carried: dict[str, QuantizedBatch] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers."""
        return self._source.infos()[name].shape

    def original(self, name: str) -> Tensor:
        """The source's weight, float32 on the device."""
        return self._cached((name, False), lambda: self._source.read(name).to(self._device).float())

    def carried(self, name: str) -> Tensor:
        """The weight that the quantised stream computes with."""
        batch = self._carried.get(name)
        return self.original(name) if batch is None else self._cached((name, True), lambda: batch.decode()[0])

    def carry(self, name: str, batch: QuantizedBatch) -> None:
        """From now on the quantised stream computes with this linear (a batch of one)."""
        if self.carries_quantised:
            self._carried[name] = batch

    def forget(self) -> None:
        """A block is done: free what was carried and cached for it."""
        self._carried.clear()
        self._cache.clear()

    def by_stream(self) -> tuple[Callable[[str], Tensor], Callable[[str], Tensor]]:
        """Weights for the stream that is calibrated on, and for the original one."""
        return self.carried, self.original

    def _cached(self, key: tuple[str, bool], make: Callable[[], Tensor]) -> Tensor:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        weight = make()
        self._cache[key] = weight
        while self._cache and sum(kept.nbytes for kept in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return weight
