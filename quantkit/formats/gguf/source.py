"""A GGUF model as a source of decoded tensors under official names: experts out of their stacked tensors, linears put
together from their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quantkit.errors import SourceError
from quantkit.formats.gguf.header import TensorEntry
from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.gguf.types import TYPES_BY_ID
from quantkit.schemes import GgmlScheme
from quantkit.schemes.ggml.types import BLOCK_TYPES
from quantkit.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class Part(Protocol):
    """Part of a linear as a family describes it: names, the whole's shape (out, in), and how it is put into the
    whole."""

    @property
    def name(self) -> str: ...
    @property
    def whole(self) -> str: ...
    @property
    def whole_shape(self) -> tuple[int, int]: ...
    @property
    def put(self) -> Callable[[Tensor, Tensor], None]: ...


class GgufSource:
    """A `TensorSource` of float32 tensors. An open resource: use it in ``with``, or `close` it.

    ``names``: official name (or name of a part) -> GGUF name and place in a stacked tensor, for all tensors that the
    model may have; ``parts``: of linears that are stored in parts.
    """

    def __init__(self, path: Path, names: Mapping[str, tuple[str, int | None]], parts: Sequence[Part]) -> None:
        """``path``: as for `GgufReader`. Raises `SourceError` for a type that cannot be decoded."""
        self.reader = GgufReader(path)
        self._names = {name: place for name, place in names.items() if place[0] in self.reader.tensors}
        wholes: dict[str, list[Part]] = {}
        for part in parts:
            wholes.setdefault(part.whole, []).append(part)
        self._parts = {whole: own for whole, own in wholes.items() if all(part.name in self._names for part in own)}
        self._infos = {name: self._info(name) for name in self._names}
        for whole, own in self._parts.items():
            self._infos[whole] = self._whole_info(whole, own)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by official name, linears in parts also as a whole; all as F32."""
        return self._infos

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor or rows ``[start, stop)`` of its first dimension, float32 on the CPU."""
        if name in self._parts:
            whole = self._assembled(name)
            return whole if rows is None else whole[rows[0] : rows[1]]
        info = self._infos[name]
        start, stop = rows or (0, info.shape[0])
        stored, place = self._names[name]
        entry = self.reader.tensors[stored]
        row_bytes = _nbytes(entry.kind, info.shape) // info.shape[0]
        first = (place or 0) * info.shape[0] + start
        data = self.reader.read(stored, first * row_bytes, (stop - start) * row_bytes)
        return _decoded(entry.kind, data.view(-1, _nbytes(entry.kind, info.shape[-1:]))).view(-1, *info.shape[1:])

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows in the given order, repeats allowed: each read by itself, all decoded at once."""
        import torch

        if name in self._parts or not indices:
            return self.read(name)[list(indices)]
        info, (stored, place) = self._infos[name], self._names[name]
        kind = self.reader.tensors[stored].kind
        row_bytes, first = _nbytes(kind, info.shape) // info.shape[0], (place or 0) * info.shape[0]
        data = torch.stack([self.reader.read(stored, (first + row) * row_bytes, row_bytes) for row in indices])
        return _decoded(kind, data.view(-1, _nbytes(kind, info.shape[-1:]))).view(-1, *info.shape[1:])

    def prefetch(self, names: list[str]) -> None:
        """Nothing is read ahead."""

    def close(self) -> None:
        """Close the files."""
        self.reader.close()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _assembled(self, name: str) -> Tensor:
        import torch

        whole = torch.empty(self._infos[name].shape)
        for part in self._parts[name]:
            part.put(whole, self.read(part.name))
        return whole

    def _whole_info(self, whole: str, own: Sequence[Part]) -> TensorInfo:
        return TensorInfo(whole, own[0].whole_shape, "F32")

    def _info(self, name: str) -> TensorInfo:
        stored, place = self._names[name]
        entry: TensorEntry = self.reader.tensors[stored]
        if entry.kind not in BLOCK_TYPES and entry.kind not in ("F32", "F16", "BF16"):
            raise SourceError(f"{self.reader.path}: {stored} is {entry.kind}, a type that quantkit does not decode.")
        shape = entry.shape if place is None else entry.shape[1:]
        if place is not None and not (len(entry.shape) == 3 and place < entry.shape[0]):
            raise SourceError(
                f"{self.reader.path}: {stored} has shape {list(entry.shape)}, which has no expert {place}."
            )
        return TensorInfo(name, shape, "F32")


_SIZES = {kind.name: kind for kind in TYPES_BY_ID.values()}


def _nbytes(kind: str, shape: tuple[int, ...]) -> int:
    return _SIZES[kind].data_bytes(shape)


def _decoded(kind: str, data: Tensor) -> Tensor:
    """data (rows, row bytes) uint8 -> (rows, in) float32."""
    import torch

    if kind in BLOCK_TYPES:
        return GgmlScheme.model_validate({"type": kind}).decode(data)
    dtype: torch.dtype = getattr(torch, DTYPES[kind][1])
    return data.view(dtype).float()
