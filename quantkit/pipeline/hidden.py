"""The hidden states between layers: embedded at the start, saved at each layer's border, loaded again by a resumed
run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.hidden_states import RowStore, load
from quantkit.calibrate.stream import embed
from quantkit.formats.fp8_source import Fp8Source
from quantkit.formats.safetensors_writer import disk_errors, sync_directory
from quantkit.pipeline.machine import Stores


@dataclass(frozen=True, slots=True)
class Streams:
    """The hidden states at a layer's border. ``original``: the same tokens through the unquantised model, if a method
    follows it."""

    x: RowStore
    original: RowStore | None

    def stores(self) -> tuple[RowStore, ...]:
        """Both, or the one."""
        return (self.x,) if self.original is None else (self.x, self.original)

    def close(self) -> None:
        """Free memory or files."""
        for store in self.stores():
            store.close()


class StreamFiles:
    """Saves and loads the streams of one job in ``folder``. ``two``: an unquantised stream goes along;
    ``scratch_dtype``: of the stores within a layer."""

    def __init__(self, folder: Path, stores: Stores, *, two: bool, scratch_dtype: torch.dtype = torch.float32) -> None:
        self._folder = folder
        self._stores = stores
        self._scratch_dtype = scratch_dtype
        self._count = 2 if two else 1
        self._shape = (0, 0)

    def open(self, rows: TokenRows, arch: ModelArch, source: Fp8Source, *, layers_done: Collection[object]) -> Streams:
        """The streams before the first layer that is not done: embeddings, or what `save` left. Clears older scratch
        files."""
        for scratch in self._folder.glob("scratch-*"):
            scratch.unlink()
        self._shape = (rows.tokens.shape[0], rows.tokens.shape[1])
        stores = [self._stores.new(*self._shape, arch.hidden_size) for _ in range(self._count)]
        done = [layer for layer in layers_done if isinstance(layer, int) and layer < arch.n_layers]
        if done:
            for number, store in enumerate(stores):
                load(self._path(max(done), number), store)
        else:
            tokens = torch.from_numpy(rows.tokens).long()
            for store in stores:
                embed(lambda ids: source.read_rows(arch.embed, ids.tolist()).float(), tokens, store)
        return Streams(stores[0], stores[1] if self._count > 1 else None)

    def scratch(self, width: int) -> RowStore:
        """A store for all tokens that lives within one layer."""
        return self._stores.new(*self._shape, width, self._scratch_dtype)

    def save(self, streams: Streams, layer: int) -> None:
        """Bring the streams behind ``layer`` to the disk under their own name, complete or not at all."""
        for number, store in enumerate(streams.stores()):
            path = self._path(layer, number)
            part = path.with_suffix(".part")
            store.save(part)
            part.replace(path)
        with disk_errors(self._folder):
            sync_directory(self._folder)

    def forget(self, layer: int) -> None:
        """Remove what was saved behind a layer that is no longer the last."""
        for number in range(self._count):
            self._path(layer, number).unlink(missing_ok=True)

    def _path(self, layer: int, number: int) -> Path:
        return self._folder / f"layer-{layer}-stream-{number}.f32"
