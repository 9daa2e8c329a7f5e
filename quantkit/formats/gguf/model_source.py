"""A GGUF model that is to be converted: its tensors decoded under official names, and its blocks taken over.

Blocks of Q4_0, Q5_0, Q8_0 and MXFP4 appear as the codes and scales that they hold (`quantkit.schemes.repacking`), other
types of ggml as themselves. kv_b_proj, which GGUF stores in two parts, is put together, and is plain then.

config.json and tokenizer are not in such a file as a folder needs them: they come from the original's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError, SourceError
from quantkit.formats.fp8_source import ZEROS_HINT
from quantkit.formats.gguf.source import GgufSource, Part
from quantkit.formats.safetensors.file_holes import file_holes
from quantkit.formats.safetensors.header import ShardHeader, StoredTensor, printable
from quantkit.formats.safetensors.reader import require_finite, row_ranges
from quantkit.formats.safetensors.zero_tail import zero_tails
from quantkit.formats.storage import FileState
from quantkit.formats.zero_runs import zero_runs
from quantkit.schemes import Scheme
from quantkit.schemes.ggml.types import BLOCK_TYPES
from quantkit.schemes.repacking import unpacked, unpacked_scale, unpacked_scheme
from quantkit.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored


class GgufModelSource(GgufSource):
    """A `ModelSource`. Plain tensors have the dtype that the file has, decoded ones are F32."""

    def __init__(
        self,
        path: Path,
        names: Mapping[str, tuple[str, int | None]],
        parts: Sequence[Part],
        folder: Path,
        config: Mapping[str, object],
        notes: tuple[str, ...] = (),
    ) -> None:
        """``path``, ``names``, ``parts``: as for `GgufSource`; ``folder``: of config.json and tokenizer; ``config``:
        the raw config.json; ``notes``: what is known to be unusual.

        Raises `SourceError` for a type that cannot be decoded.
        """
        super().__init__(path, names, parts)
        self.directory = folder
        self.config: Mapping[str, object] = config
        self.unlisted: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = (*notes, *self._notes())
        self._least_zeros: Mapping[str, int] = {}
        of_parts = {part.name for own in self._parts.values() for part in own}
        self._shown = {name: info for name, info in self._infos.items() if name not in of_parts}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the model, in their order."""
        return self.reader.files

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by official name, no parts."""
        return self._shown

    def stored_as(self, name: str) -> Scheme | None:
        """What a matrix is stored in, None for plain tensors and those that are put together from parts."""
        kind = None if name in self._parts else self._kind(name)
        return unpacked_scheme(kind) if kind in BLOCK_TYPES else None

    def read_stored(self, name: str) -> Stored:
        """Codes and scales, or blocks, by the names of the scheme's ``decode``. Raises `SourceError` for scales that
        are no numbers."""
        blocks, kind = self._blocks(name), self._kind(name)
        self._refuse_runs(name, blocks, BLOCK_TYPES[kind].bpw / 8)
        try:
            stored = unpacked(kind, blocks)
        except SchemeError as error:
            raise SourceError(f"{self.path_of(name)}: {printable(name)}: {error.message}") from None
        if "scale" in stored:
            require_finite(name, str(self.path_of(name)), stored["scale"])
        return stored

    def read_scale(self, name: str) -> Tensor:
        """The scales alone, (out, groups) in their dtype. Blocks hold them between the codes, so all is read."""
        return unpacked_scale(self._kind(name), self._blocks(name))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor or rows ``[start, stop)``, on the CPU. Raises `SourceError` for NaN, infinity, and as
        `refuse_zeros` says."""
        tensor = self._as_shown(name, super().read(name, rows))
        require_finite(name, str(self.path_of(name)), tensor)
        self._refuse_runs(name, tensor, 1.0)
        return tensor

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows in the given order, repeats allowed."""
        return self._as_shown(name, super().read_rows(name, indices))

    def read_on(self, name: str, device: torch.device) -> Tensor:
        """The tensor on a device, decoded before. Thread-safe."""
        return self.read(name).to(device)

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The tensor in consecutive pieces of at most ``max_bytes`` (decoded), but at least one row."""
        for rows in row_ranges(self._infos[name], max_bytes):
            yield self.read(name, rows)

    def share(self, copies: Mapping[str, str]) -> None:
        """Show tensors under further names: name -> a tensor of `infos`."""
        for name, original in copies.items():
            self._names[name] = self._names[original]
            self._infos[name] = TensorInfo(name, self._infos[original].shape, self._infos[original].dtype)
            self._shown[name] = self._infos[name]

    def refuse_zeros(self, least: Mapping[str, int]) -> None:
        """See `ModelSource.refuse_zeros`."""
        self._least_zeros = least

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor, or its first part."""
        return self.reader.path_of(self._stored_name(name))

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same type, shape and bytes."""
        import torch

        one, two = self.reader.tensors[self._stored_name(name)], self.reader.tensors[self._stored_name(other)]
        same = (one.kind, one.shape) == (two.kind, two.shape)
        return same and torch.equal(self.reader.read(one.name), self.reader.read(two.name))

    def zeros(self, limits: Mapping[str, int]) -> tuple[str, ...]:
        """A line for each file that ends in rows of zeros; without any, for each that has a hole."""
        headers, directory = self._as_shards(), self.reader.directory
        least = {
            self._stored_name(name): math.ceil(limit * self._bytes_per_weight(name))
            for name, limit in limits.items()
            if name in self._shown
        }
        return zero_tails(directory, headers) or file_holes(directory, headers, least)

    @property
    def origin(self) -> str:
        """None: GGUF is read from this machine."""
        return ""

    def states(self) -> Mapping[str, FileState]:
        """See `ModelSource.states`."""
        return self.reader.states()

    def fingerprint(self) -> str:
        """sha256 (hex) of config.json and of what `GgufReader.fingerprint` covers."""
        config = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(f"{config}\0{self.reader.fingerprint()}".encode()).hexdigest()

    def __enter__(self) -> GgufModelSource:
        return self

    def _info(self, name: str) -> TensorInfo:
        info, kind = super()._info(name), self._kind(name)
        return info if kind in BLOCK_TYPES else TensorInfo(name, info.shape, kind)

    def _whole_info(self, whole: str, own: Sequence[Part]) -> TensorInfo:
        dtypes = {self._infos[part.name].dtype for part in own}
        return TensorInfo(whole, own[0].whole_shape, dtypes.pop() if len(dtypes) == 1 else "F32")

    def _as_shown(self, name: str, tensor: Tensor) -> Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self._infos[name].dtype][1])
        return tensor.to(dtype)

    def _kind(self, name: str) -> str:
        return self.reader.tensors[self._stored_name(name)].kind

    def _stored_name(self, name: str) -> str:
        first = self._parts[name][0].name if name in self._parts else name
        return self._names[first][0]

    def _bytes_per_weight(self, name: str) -> float:
        entry = self.reader.tensors[self._stored_name(name)]
        return entry.nbytes / math.prod(entry.shape)

    def _blocks(self, name: str) -> Tensor:
        """(out, row bytes) uint8"""
        (stored, place), (n_out, n_in) = self._names[name], self._infos[name].shape
        row_bytes = BLOCK_TYPES[self._kind(name)].row_bytes(n_in)
        return self.reader.read(stored, (place or 0) * n_out * row_bytes, n_out * row_bytes).view(n_out, row_bytes)

    def _refuse_runs(self, name: str, tensor: Tensor, per_weight: float) -> None:
        """Raise for zeros in a row. ``per_weight``: numbers of ``tensor`` for each weight."""
        least = self._least_zeros.get(name)
        for run in () if least is None else zero_runs(tensor, math.ceil(least * per_weight)):
            raise SourceError(
                f"{self.path_of(name)}: {printable(name)}: {run.stop - run.start:,} numbers in a row are zero.",
                hint=ZEROS_HINT,
            )

    def _as_shards(self) -> list[ShardHeader]:
        """The headers as those of shards: every tensor as bytes (rows, row bytes)."""
        shards: list[ShardHeader] = []
        for header in self.reader.headers:
            tensors: dict[str, StoredTensor] = {}
            for name, entry in header.tensors.items():
                rows = math.prod(entry.shape[:-1])
                shape = (entry.nbytes,) if len(entry.shape) == 1 else (rows, entry.nbytes // rows)
                stop = entry.offset + entry.nbytes
                tensors[name] = StoredTensor(TensorInfo(name, shape, "U8"), header.file, entry.offset, stop)
            shards.append(ShardHeader(header.file, header.size, 0, b"", tensors))
        return shards

    def _notes(self) -> tuple[str, ...]:
        """A line if parts in blocks are put together, which no scheme stores as a whole."""
        kinds_of = {whole: {self._kind(part.name) for part in own} for whole, own in self._parts.items()}
        found = [whole for whole, kinds in kinds_of.items() if kinds.intersection(BLOCK_TYPES)]
        if not found:
            return ()
        more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
        kinds = ", ".join(sorted(kinds_of[found[0]]))
        return (
            f"{found[0]}{more}: stored in two parts as {kinds}, one of them transposed. No scheme holds that as a "
            "whole: decoded, as float32.",
        )
