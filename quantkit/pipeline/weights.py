"""The weights of one layer on demand: original ones from the source, carried ones as the first output stores them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.tensors import TensorSource


class LayerWeights:
    """Float32 weights by name for the two streams of a layer.

    Dense linears are asked for once a batch of rows, so the latest are kept up to ``cache_bytes``; the experts are read once and pass by.
    """

    def __init__(
        self, source: TensorSource, *, carries_quantised: bool, cache_bytes: int, device: torch.device
    ) -> None:
        self.carries_quantised = carries_quantised
        self._source = source
        self._device = device
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._carried: dict[str, Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers."""
        return self._source.infos()[name].shape

    def original(self, name: str) -> Tensor:
        """The source's weight, float32 on the device."""
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        weight = self._source.read(name).to(self._device).float()
        self._cache[name] = weight
        while sum(t.nbytes for t in self._cache.values()) > self._cache_bytes and self._cache:
            self._cache.popitem(last=False)
        return weight

    def carried(self, name: str) -> Tensor:
        """The weight that the quantised stream computes with."""
        weight = self._carried.get(name)
        return self.original(name) if weight is None else weight

    def carry(self, name: str, weight: Tensor) -> None:
        """From now on the quantised stream computes with this (out, in) float32 weight."""
        if self.carries_quantised:
            self._carried[name] = weight

    def by_stream(self) -> tuple[Callable[[str], Tensor], Callable[[str], Tensor]]:
        """Weights for the stream that is calibrated on, and for the original one."""
        return self.carried, self.original
