"""The weights of one layer on demand: original ones from the source, carried ones as the first output stores them.

The streams compute in float32; on a GPU with Triton, linears whose source is BF16 (or FP8, which decodes to it)
compute in bfloat16, as runtimes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quantkit.arch.base import LinearPart
from quantkit.calibrate.weight_cache import WeightCache
from quantkit.quantizers.batch import QuantizedBatch
from quantkit.quantizers.rescaling import NO_FOLDING, Folding
from quantkit.tensors import TensorInfo


class WeightSource(Protocol):
    """What `LayerWeights` needs of a source; tensors may lie anywhere."""

    def infos(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> Tensor: ...
    def expect(self, names: Sequence[str]) -> None: ...


class LayerWeights:
    """Weights by name for the two streams of a layer.

    Dense linears are asked for once a batch of rows, so the latest of each stream are kept up to half of
    ``cache_bytes``.
    Quantised linears are held as stored and decoded when asked for; one that was quantised in ``parts`` is put
    together. ``narrow``: the dtype in which the streams compute with a source in BF16; with any other, in float32.
    """

    def __init__(
        self,
        source: WeightSource,
        parts: Mapping[str, LinearPart],
        *,
        carries_quantised: bool,
        cache_bytes: int,
        device: torch.device,
        narrow: torch.dtype,
    ) -> None:
        self.carries_quantised = carries_quantised
        self._parts = parts
        self._parts_of: dict[str, tuple[str, ...]] = {}
        for part in parts.values():
            self._parts_of[part.whole] = (*self._parts_of.get(part.whole, ()), part.name)
        self._source = source
        self.device = device
        self._narrow = narrow
        self._batches: dict[str, QuantizedBatch] = {}
        self._part_batches: dict[str, dict[str, QuantizedBatch]] = {}
        self._folding = NO_FOLDING
        self._original = WeightCache(self._computed, cache_bytes // 2)
        self._carried = WeightCache(self._decoded, cache_bytes // 2)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers."""
        return self._source.infos()[name].shape

    def expect(self, names: Sequence[str]) -> None:
        """These tensors will be read next, in this order, by `from_source`."""
        self._source.expect(names)

    def read(self, name: str, folding: Folding = NO_FOLDING) -> Tensor:
        """The source's weight, or a part (heads, out, in) of it, float32 on the device, not kept: for weights that are
        asked for once. A part is cut from the weight with ``folding``."""
        part = self._parts.get(name)
        if part is not None:
            return part.take(folding.folded(part.whole, self.original(part.whole).float()))
        return self._source.read(name).to(self.device).float()

    def from_source(self, name: str) -> Tensor:
        """The source's weight in the dtype that the source shows (FP8 as bfloat16), wherever it lies, not kept."""
        assert name not in self._parts, f"{name}: a part of a tensor"
        return self._source.read(name)

    def dtype(self, name: str) -> torch.dtype:
        """In which the streams compute with this tensor."""
        return self._narrow if self._source.infos()[name].dtype == "BF16" else torch.float32

    def original(self, name: str) -> Tensor:
        """The source's weight on the device."""
        return self._original(name)

    def carried(self, name: str) -> Tensor:
        """The weight that the quantised stream computes with."""
        known = name in self._batches or name in self._part_batches
        return self._carried(name) if known else self._original(name)

    def whole_of(self, name: str) -> str:
        """Name of the linear that a part is a part of, or the name itself."""
        return self._parts[name].whole if name in self._parts else name

    def parts_of(self, name: str) -> tuple[str, ...]:
        """A linear's name and those of its parts."""
        return (name, *self._parts_of.get(name, ()))

    def carry(self, name: str, batch: QuantizedBatch, folding: Folding = NO_FOLDING) -> None:
        """From now on the quantised stream computes with this linear, or with this part of one. ``folding``: what was
        done to the linear before, the same for all linears of a block; the stream computes without."""
        if not self.carries_quantised:
            return
        self._folding = folding
        part = self._parts.get(name)
        if part is None:
            self._batches[name] = batch
        else:
            self._part_batches.setdefault(part.whole, {})[name] = batch
            self._carried.forget()

    def _computed(self, name: str) -> Tensor:
        return self._source.read(name).to(self.device, self.dtype(name))

    def _decoded(self, name: str) -> Tensor:
        if name in self._batches:
            return self._folding.unfolded(name, self._batches[name].decode()[0]).to(self.dtype(name))
        whole = self._folding.folded(name, self._original(name).clone())
        for part, batch in self._part_batches[name].items():
            self._parts[part].put(whole, batch.decode().view(self._parts[part].shape))
        return self._folding.unfolded(name, whole).to(self.dtype(name))

    def forget(self) -> None:
        """A block is done: free what was carried and kept for it."""
        self._batches.clear()
        self._part_batches.clear()
        self._original.forget()
        self._carried.forget()

    def by_stream(self, n_streams: int) -> tuple[Callable[[str], Tensor], ...]:
        """Weights for the stream that is calibrated on and, if there are two, for the original one."""
        return (self.carried, self.original)[:n_streams]
