"""`ModelSource`: the tensors of a model that is to be quantised, decoded, in whatever they are stored. `open_source`
opens a folder: BF16, F16, F32, FP8 blocks, or packed linears of compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quantkit.formats.packed_source import PackedSource
from quantkit.formats.source import PACKED_METHOD, checkpoint_name, open_plain, quant_method, read_config
from quantkit.formats.storage import LOCAL, FileState, Storage
from quantkit.schemes import Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored


class ModelSource(AbstractContextManager["ModelSource"], Protocol):
    """What a conversion reads. ``config``: the raw config.json. Reads are thread-safe."""

    config: Mapping[str, object]

    @property
    def directory(self) -> Path:
        """The folder of config.json and tokenizer."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights, all in one folder."""
        ...

    @property
    def origin(self) -> str:
        """Where a remote source comes from, without credentials; "" for files of this machine."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about these files, a line each."""
        ...

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Names that shards hold but the index does not list; they are not shown."""
        ...

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, decoded, without scales and the like."""
        ...

    def stored_as(self, name: str) -> Scheme | None:
        """What a linear is stored in, None for plain tensors."""
        ...

    def read_stored(self, name: str) -> Stored:
        """What is stored of such a linear, by the names of its scheme's ``decode``."""
        ...

    def read_scale(self, name: str) -> Tensor:
        """Its scales alone, in their dtype."""
        ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The decoded tensor, or rows ``[start, stop)``, on the CPU."""
        ...

    def read_on(self, name: str, device: torch.device) -> Tensor:
        """The decoded tensor on a device."""
        ...

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows in the given order, repeats allowed."""
        ...

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The decoded tensor in consecutive pieces of at most ``max_bytes``, but at least one row."""
        ...

    def prefetch(self, names: list[str]) -> None:
        """Ask the operating system, or a remote source's cache, to read what is stored of these tensors ahead."""
        ...

    def share(self, copies: Mapping[str, str]) -> None:
        """Show plain tensors under further names: name -> a tensor of `infos`."""
        ...

    def refuse_zeros(self, least: Mapping[str, int]) -> None:
        """From now on reading a tensor, or rows of it, raises `SourceError` for ``least[name]`` zeros in a row or
        more, in it or in its packed codes: what a hole in a file looks like."""
        ...

    def path_of(self, name: str) -> Path:
        """The file that holds a plain tensor."""
        ...

    def equal(self, name: str, other: str) -> bool:
        """Whether two plain tensors have the same dtype, shape and bytes."""
        ...

    def zeros(self, limits: Mapping[str, int]) -> tuple[str, ...]:
        """A line for each file that ends in rows of zeros, or has a hole of ``limits[name]`` weights or more: what
        interrupted downloads leave."""
        ...

    def states(self) -> Mapping[str, FileState]:
        """By the name of each of ``files`` what tells it from another, without reading it."""
        ...

    def fingerprint(self) -> str:
        """sha256 (hex) that tells whether a resumed job still reads the same checkpoint."""
        ...

    def close(self) -> None:
        """Give the file descriptors back."""
        ...


def source_name(source: ModelSource) -> str:
    """What to call it: its folder's name or that of its repository; of GGUF the file's."""
    first = source.files[0]
    return re.sub(r"-\d{5}-of-\d{5}$", "", first.stem) if first.suffix == ".gguf" else checkpoint_name(source.directory)


def open_source(path: Path | str, storage: Storage = LOCAL) -> ModelSource:
    """Open a checkpoint by its headers alone. ``storage``: opens its shards.

    Raises `SourceError` if anything about config, index, headers, or what belongs to a packed linear is missing,
    damaged or contradictory, or if it is quantised in a way that cannot be decoded.
    """
    directory = Path(path)
    if quant_method(read_config(directory)) == PACKED_METHOD:
        return PackedSource(directory, storage)
    return open_plain(directory, storage)
