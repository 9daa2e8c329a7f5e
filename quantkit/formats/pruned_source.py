"""A checkpoint without some of its routed experts: those that stay are renumbered, the router has rows for them alone.

Whoever reads such a source sees the model that is left, in any storage. Nothing else knows that experts are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.formats.model_source import ModelSource
from quantkit.formats.safetensors.reader import row_ranges
from quantkit.schemes import Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.formats.storage import FileState
    from quantkit.schemes.grid import Stored


@dataclass(frozen=True, slots=True)
class PrunedView:
    """What is shown of a checkpoint. ``origins``: a tensor of an expert -> the stored tensor that it is; ``gone``:
    stored tensors of experts that are shown under no name of their own; ``rows``: a tensor with rows by expert -> those
    that stay, in their new order."""

    origins: Mapping[str, str]
    gone: frozenset[str]
    rows: Mapping[str, tuple[int, ...]]

    def infos(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors that are shown of ``stored``."""
        return {name: self._info(name, stored) for name in stored if name not in self.gone}

    def stored(self, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """What those that are not plain are stored in."""
        origins = {name: self.origin(name) for name in schemes if name not in self.gone}
        return {name: schemes[origin] for name, origin in origins.items() if origin in schemes}

    def origin(self, name: str) -> str:
        """The stored tensor behind a shown one."""
        return self.origins.get(name, name)

    def _info(self, name: str, stored: Mapping[str, TensorInfo]) -> TensorInfo:
        info = stored[self.origin(name)]
        rows = self.rows.get(name)
        shape = info.shape if rows is None else (len(rows), *info.shape[1:])
        return TensorInfo(name, shape, info.dtype)


class PrunedSource:
    """A `ModelSource` that shows a part of another one, which it closes. ``config``: that of the model that is left."""

    def __init__(self, whole: ModelSource, view: PrunedView, config: Mapping[str, object]) -> None:
        self.whole = whole
        self.config: Mapping[str, object] = config
        self._view = view
        self._infos = view.infos(whole.infos())

    @property
    def directory(self) -> Path:
        """The folder of tokenizer and of the whole model's config.json."""
        return self.whole.directory

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the whole model."""
        return self.whole.files

    @property
    def origin(self) -> str:
        """See `ModelSource.origin`."""
        return self.whole.origin

    @property
    def notes(self) -> tuple[str, ...]:
        """See `ModelSource.notes`."""
        return self.whole.notes

    @property
    def unlisted(self) -> tuple[str, ...]:
        """See `ModelSource.unlisted`."""
        return self.whole.unlisted

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model that is left."""
        return self._infos

    def stored_as(self, name: str) -> Scheme | None:
        """See `ModelSource.stored_as`."""
        return self.whole.stored_as(self._view.origin(name))

    def read_stored(self, name: str) -> Stored:
        """See `ModelSource.read_stored`."""
        return self.whole.read_stored(self._view.origin(name))

    def read_scale(self, name: str) -> Tensor:
        """See `ModelSource.read_scale`."""
        return self.whole.read_scale(self._view.origin(name))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `ModelSource.read`. Of a tensor with rows by expert those of the experts that stay."""
        kept = self._view.rows.get(name)
        if kept is None:
            return self.whole.read(self._view.origin(name), rows)
        return self.whole.read(name)[list(kept[slice(*rows)] if rows else kept)]

    def read_on(self, name: str, device: torch.device) -> Tensor:
        """See `ModelSource.read_on`."""
        if name in self._view.rows:
            return self.read(name).to(device)
        return self.whole.read_on(self._view.origin(name), device)

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """See `ModelSource.read_rows`."""
        kept = self._view.rows.get(name)
        if kept is None:
            return self.whole.read_rows(self._view.origin(name), indices)
        return self.whole.read_rows(name, [kept[index] for index in indices])

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """See `ModelSource.chunks`."""
        if name not in self._view.rows:
            yield from self.whole.chunks(self._view.origin(name), max_bytes)
            return
        for rows in row_ranges(self._infos[name], max_bytes):
            yield self.read(name, rows)

    def prefetch(self, names: list[str]) -> None:
        """See `ModelSource.prefetch`."""
        self.whole.prefetch([self._view.origin(name) for name in names])

    def share(self, copies: Mapping[str, str]) -> None:
        """See `ModelSource.share`. No expert's tensor is a copy of another."""
        self.whole.share(copies)
        self._infos = self._view.infos(self.whole.infos())

    def refuse_zeros(self, least: Mapping[str, int]) -> None:
        """See `ModelSource.refuse_zeros`."""
        self.whole.refuse_zeros({self._view.origin(name): limit for name, limit in least.items()})

    def path_of(self, name: str) -> Path:
        """See `ModelSource.path_of`."""
        return self.whole.path_of(self._view.origin(name))

    def equal(self, name: str, other: str) -> bool:
        """See `ModelSource.equal`."""
        return self.whole.equal(self._view.origin(name), self._view.origin(other))

    def zeros(self, limits: Mapping[str, int]) -> tuple[str, ...]:
        """See `ModelSource.zeros`: of the whole model's files."""
        return self.whole.zeros({self._view.origin(name): limit for name, limit in limits.items()})

    def states(self) -> Mapping[str, FileState]:
        """See `ModelSource.states`."""
        return self.whole.states()

    def fingerprint(self) -> str:
        """The whole model's: which experts stay follows from the job."""
        return self.whole.fingerprint()

    def close(self) -> None:
        """Close the whole model."""
        self.whole.close()

    def __enter__(self) -> PrunedSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
