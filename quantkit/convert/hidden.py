"""The hidden states between layers: embedded at the start, saved at borders of layers, loaded again by a resumed run.

Of several ranks each has its own rows. What is saved is a file for each slice of rows, so another number of ranks can
load it.

Saving has its price: DeepSeek V3's two streams of 512 Ki tokens have 30 GB. A border is left out until ten times as
long has passed as the last saving took; an interrupted run then repeats the layers after the last saved border.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.arch.base import ModelArch
from quantkit.calibrate.chunk_sizes import OwnRows, own_rows
from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.hidden_states import RowStore, load
from quantkit.calibrate.stream import embed
from quantkit.formats.model_source import ModelSource
from quantkit.formats.preallocated import disk_errors, sync_directory
from quantkit.plan.machine import Stores

SAVING_PAUSE = 10
"""How many times as long as the last saving took passes before the next one."""


@dataclass(frozen=True, slots=True)
class Streams:
    """The hidden states at a layer's border. ``original``: the same tokens through the unquantised model, if a method
    follows it. ``new_rows(width)``: makes a store for something else of all tokens, in memory or on disk, that lives
    within one layer. ``own``: the rows that these are, None for all."""

    x: RowStore
    original: RowStore | None
    new_rows: Callable[[int], RowStore]
    own: OwnRows | None = None

    @property
    def rows(self) -> OwnRows:
        """The rows of this rank."""
        return own_rows(self.x.n_rows) if self.own is None else self.own

    def stores(self) -> tuple[RowStore, ...]:
        """The calibrated stream and, if there is one, the unquantised one."""
        return (self.x,) if self.original is None else (self.x, self.original)

    def close(self) -> None:
        """Free memory or files."""
        for store in self.stores():
            store.close()


class StreamFiles:
    """Saves and loads the streams of one job in ``folder``. ``two``: an unquantised stream goes along;
    ``scratch_dtype``: the dtype of stores that live within a layer; ``own``: this rank's rows of the calibration text,
    None without one."""

    def __init__(
        self,
        folder: Path,
        stores: Stores,
        own: OwnRows | None,
        *,
        two: bool,
        scratch_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._folder = folder
        self._own = own
        self._stores = stores
        self._scratch_dtype = scratch_dtype
        self._count = 2 if two else 1
        self._shape = (0, 0)
        self._pause_ends = 0.0

    def open(self, rows: TokenRows, arch: ModelArch, source: ModelSource, *, after: int | None) -> Streams:
        """This rank's rows of the streams after layer ``after``, which `save` left, or of the embeddings. ``rows``: of
        all ranks."""
        assert self._own is not None, "there is a calibration text"
        first, count = self._own.first, self._own.count
        self._shape = (count, rows.tokens.shape[1])
        stores = [self._stores.new(*self._shape, arch.hidden_size) for _ in range(self._count)]
        if after is not None:
            for number, store in enumerate(stores):
                for place, span in self._parts(after, number):
                    load(place, store, span)
        else:
            tokens = torch.from_numpy(rows.tokens[first : first + count]).long()
            for store in stores:
                embed(lambda ids: source.read_rows(arch.embed, ids.tolist()).float(), tokens, store)
        return self._streams(stores)

    def shortened(self, streams: Streams, fill: Callable[[RowStore, RowStore], None]) -> Streams:
        """Streams whose rows have one token less: ``fill(old, new)`` makes each of the old one, which is closed."""
        self._shape = (self._shape[0], self._shape[1] - 1)
        stores: list[RowStore] = []
        for old in streams.stores():
            stores.append(self._stores.new(*self._shape, old.width))
            fill(old, stores[-1])
            old.close()
        return self._streams(stores)

    def due(self) -> bool:
        """Whether the next border is to be saved."""
        return time.monotonic() >= self._pause_ends

    def save(self, streams: Streams, layer: int) -> None:
        """Bring this rank's rows of the streams after ``layer`` to the disk under their own names, each file complete
        or not at all."""
        start = time.monotonic()
        for number, store in enumerate(streams.stores()):
            for path, span in self._parts(layer, number):
                part = path.with_suffix(".part")
                store.save(part, span)
                with disk_errors(path):
                    part.replace(path)
        with disk_errors(self._folder):
            sync_directory(self._folder)
        now = time.monotonic()
        self._pause_ends = now + SAVING_PAUSE * (now - start)

    def forget_before(self, layer: int) -> None:
        """Remove what all ranks saved after earlier layers."""
        for path in sorted(self._folder.glob("layer-*-stream-*.f32")):
            if not path.name.startswith(f"layer-{layer}-"):
                with disk_errors(path):
                    path.unlink()

    def _scratch(self, width: int) -> RowStore:
        return self._stores.new(*self._shape, width, self._scratch_dtype)

    def _streams(self, stores: list[RowStore]) -> Streams:
        return Streams(stores[0], stores[1] if self._count > 1 else None, self._scratch, self._own)

    def _parts(self, layer: int, number: int) -> Iterator[tuple[Path, tuple[int, int]]]:
        """The file of each slice of this rank, and its rows."""
        assert self._own is not None, "there are streams"
        for place, span in enumerate(self._own.slices, self._own.first_slice):
            yield self._folder / f"layer-{layer}-stream-{number}-slice-{place}.f32", span
