"""A checkpoint that is quantised already, as the source of a conversion: packed linears appear decoded, float32, one at
a time, and what they are stored as can be taken over as it is.

compressed-tensors' formats, as Kimi K2-Thinking (int4 in groups of 32) is released in. Decoding is the layouts' own,
the same that evaluates such a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderSource
from quantkit.formats.fp8_source import ZEROS_HINT
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.layouts.packing import StoredLinear
from quantkit.formats.safetensors.header import printable
from quantkit.formats.storage import LOCAL, Storage
from quantkit.formats.stored_in_shards import StoredInShards
from quantkit.formats.zero_runs import zero_runs
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored


class PackedSource(StoredInShards, FolderSource):
    """A `ModelSource` of a compressed-tensors folder."""

    def __init__(self, directory: Path | str, storage: Storage = LOCAL) -> None:
        """Read config.json and headers. Raises `SourceError` as `FolderSource` does, and for a config.json that says
        compressed-tensors where nothing is packed."""
        super().__init__(directory, COMPRESSED_TENSORS.reader, storage)
        self._least_zeros: Mapping[str, int] = {}
        if not any(map(self.stored_as, self.infos())):
            self.close()
            raise SourceError(
                f"{self.directory / 'config.json'}: quantization_config says compressed-tensors, but no linear is "
                "packed: it is stale.",
                hint="Remove quantization_config from config.json if the weights were decoded.",
            )

    def refuse_zeros(self, least: Mapping[str, int]) -> None:
        """See `ModelSource.refuse_zeros`."""
        self._least_zeros = least

    def stored_as(self, name: str) -> Scheme | None:
        """What a linear is stored in, None for plain tensors."""
        return self.scheme(name)

    def read_stored(self, name: str) -> Stored:
        """Codes and scales of a linear as they are stored, by the names of its scheme's ``decode``. Raises
        `SourceError` for scales that are no numbers."""
        self._refuse_blank_codes(name, None)
        return self._stored(name).read_stored(self.raw)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The decoded tensor or rows ``[start, stop)``, on the CPU. Raises `SourceError` as `refuse_zeros` says."""
        tensor = super().read(name, rows)
        least = self._least_zeros.get(name)
        if least is not None:
            linear = self._linears.get(name)
            if linear is not None:
                self._refuse_blank_codes(name, rows)
            self._refuse_runs(name, name if linear is None else linear.parts[0], tensor, least)
        return tensor

    def read_scale(self, name: str) -> Tensor:
        """The scales alone, (out, groups) in their dtype."""
        return self._stored(name).read_scale(self.raw)

    def read_on(self, name: str, device: torch.device) -> Tensor:
        """The tensor on a device, which decodes it: the same values as `read` gives. Thread-safe."""
        scheme = self.scheme(name)
        if scheme is None or device.type == "cpu":
            return self.read(name).to(device)
        return scheme.decode(**{part: value.to(device) for part, value in self.read_stored(name).items()})

    def share(self, copies: Mapping[str, str]) -> None:
        """Show plain tensors under further names: name -> a tensor of `infos`. Raises `SourceError` for a packed
        one."""
        for name, original in copies.items():
            if self.scheme(original) is not None:
                raise SourceError(
                    f"{self.directory}: {printable(name)} is missing, and {printable(original)}, which would stand for "
                    "it, is packed."
                )
        self.raw.share(copies)
        self._infos |= {name: self.raw.infos()[name] for name in copies}

    def __enter__(self) -> PackedSource:
        return self

    def _refuse_blank_codes(self, name: str, rows: tuple[int, int] | None) -> None:
        least, part = self._least_zeros.get(name), self._linears[name].parts[0]
        if least is not None:
            stored = self.raw.infos()[part]
            words = self.raw.read_unchecked(part, pinned=False) if rows is None else self.raw.read(part, rows)
            words = words.float() if stored.dtype.startswith("F8_") else words
            self._refuse_runs(name, part, words, least * stored.numel // self.infos()[name].numel)

    def _refuse_runs(self, name: str, stored: str, tensor: Tensor, least: int) -> None:
        for run in zero_runs(tensor, least):
            raise SourceError(
                f"{self.raw.path_of(stored)}: {printable(name)}: {run.stop - run.start:,} numbers in a row are zero.",
                hint=ZEROS_HINT,
            )

    def _stored(self, name: str) -> StoredLinear:
        linear = self._linears[name]
        assert isinstance(linear, StoredLinear), f"{name}: its layout cannot take it over"
        return linear
