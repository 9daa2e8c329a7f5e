"""The weights of one layer on demand: original ones from the source, carried ones as the first output stores them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.calibrate.weight_cache import WeightCache
from quantkit.quantizers.batch import QuantizedBatch
from quantkit.tensors import TensorSource


class LayerWeights:
    """Float32 weights by name for the two streams of a layer.

    Dense linears are asked for once a batch of rows, so the latest of each stream are kept up to half of
    ``cache_bytes``.
    Quantised linears are held as codes and decoded when asked for.
    """

    def __init__(
        self, source: TensorSource, *, carries_quantised: bool, cache_bytes: int, device: torch.device
    ) -> None:
        self.carries_quantised = carries_quantised
        self._source = source
        self._device = device
        self._batches: dict[str, QuantizedBatch] = {}
        self._original = WeightCache(self.read, cache_bytes // 2)
        self._carried = WeightCache(lambda name: self._batches[name].decode()[0], cache_bytes // 2)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers."""
        return self._source.infos()[name].shape

    def read(self, name: str) -> Tensor:
        """The source's weight, float32 on the device, not kept: for weights that are asked for once."""
        return self._source.read(name).to(self._device).float()

    def original(self, name: str) -> Tensor:
        """The source's weight, float32 on the device."""
        return self._original(name)

    def carried(self, name: str) -> Tensor:
        """The weight that the quantised stream computes with."""
        return self._carried(name) if name in self._batches else self._original(name)

    def carry(self, name: str, batch: QuantizedBatch) -> None:
        """From now on the quantised stream computes with this linear (a batch of one)."""
        if self.carries_quantised:
            self._batches[name] = batch

    def forget(self) -> None:
        """A block is done: free what was carried and kept for it."""
        self._batches.clear()
        self._original.forget()
        self._carried.forget()

    def by_stream(self, n_streams: int) -> tuple[Callable[[str], Tensor], ...]:
        """Weights for the stream that is calibrated on and, if there are two, for the original one."""
        return (self.carried, self.original)[:n_streams]
