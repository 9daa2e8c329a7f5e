"""A GGUF model being written: rows of blocks at offsets, experts one by one into their stacked tensor.

In: planned tensors by official names (or names of parts), and what llama.cpp calls them. Out: the model's file or
files, and beside them imatrix.gguf if it is wanted. Nothing is held in memory but the tensor being written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.formats.casting import bytes_of, cast_to
from quantkit.formats.checksums import WrittenRange
from quantkit.formats.gguf.imatrix import ImatrixEntry, imatrix_tensors
from quantkit.formats.gguf.layout import GgufTensor
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.preallocated import FilesLayout, PreallocatedFiles, Steps
from quantkit.schemes import GgmlScheme, Scheme, describe
from quantkit.schemes.repacking import block_type
from quantkit.tensors import stacked_shape

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes import QuantizedTensor

StoredName = Callable[[str], "tuple[str, int | None]"]
"""Official name -> GGUF name, and the place in a stacked tensor or None."""


def kind_of(tensor: PlannedTensor) -> str:
    """ggml's name of the type that a planned tensor is stored in."""
    if tensor.scheme is None:
        return tensor.kept_info.dtype
    assert isinstance(tensor.scheme, GgmlScheme), f"{tensor.name}: the plan admits only block types of ggml here"
    return tensor.scheme.type


def nbytes_of(tensor: PlannedTensor) -> int:
    """Bytes of a planned tensor's data (an expert's: its share of the stacked tensor)."""
    return GgufTensor("t", tensor.info.shape, kind_of(tensor)).nbytes


def stacked_tensors(planned: Iterable[PlannedTensor], stored_name: StoredName) -> list[GgufTensor]:
    """The tensors of the file in order of first appearance; experts of one projection become one tensor (experts, out,
    in). All experts must have one type (`problems`)."""
    counts: dict[str, int] = {}
    first: dict[str, tuple[PlannedTensor, int | None]] = {}
    for tensor in planned:
        name, place = stored_name(tensor.name)
        counts[name] = counts.get(name, 0) + 1
        first.setdefault(name, (tensor, place))
    return [
        GgufTensor(name, stacked_shape(tensor.info.shape, place, counts[name]), kind_of(tensor))
        for name, (tensor, place) in first.items()
    ]


def problems(planned: Iterable[PlannedTensor], stored_name: StoredName) -> list[str]:
    """One line for each stacked tensor whose experts differ in type, and each tensor of a dtype that GGUF lacks."""
    lines: list[str] = []
    kinds: dict[str, tuple[str, str]] = {}
    reported: set[str] = set()
    for tensor in planned:
        if tensor.scheme is not None and not isinstance(tensor.scheme, GgmlScheme):
            lines.append(_not_of_gguf(tensor.name, tensor.scheme))
            continue
        name, place = stored_name(tensor.name)
        if place is None:
            continue
        kind, other = kind_of(tensor), kinds.setdefault(name, (kind_of(tensor), tensor.name))
        if other[0] != kind and name not in reported:
            reported.add(name)
            lines.append(f"{tensor.name}: planned as {kind}, but {other[1]} as {other[0]}; {name} holds one type.")
    return lines


def _not_of_gguf(name: str, scheme: Scheme) -> str:
    kind = block_type(scheme)
    exact = f"scheme: {kind}, method: {{kind: repack}} holds the same numbers, " if kind else ""
    return f"{name}: is {describe(scheme)} in the source, which GGUF lacks; {exact}keep: bf16 decodes it."


@dataclass(frozen=True, slots=True)
class _Place:
    planned: PlannedTensor
    name: str
    offset: int
    """Bytes before this tensor in the file's tensor: the experts before it."""


class GgufSink:
    """The open files. ``importance``: the entries of imatrix.gguf by GGUF name, none if it is not written."""

    def __init__(
        self,
        files: PreallocatedFiles,
        planned: Sequence[PlannedTensor],
        stored_name: StoredName,
        importance: Mapping[str, ImatrixEntry],
    ) -> None:
        self._files = files
        self._importance = importance
        self._stored_name = stored_name
        self._places: dict[str, _Place] = {}
        for tensor in planned:
            name, place = stored_name(tensor.name)
            self._places[tensor.name] = _Place(tensor, name, (place or 0) * nbytes_of(tensor))

    @classmethod
    def open(
        cls,
        directory: Path,
        layout: FilesLayout,
        planned: Sequence[PlannedTensor],
        stored_name: StoredName,
        importance: Mapping[str, ImatrixEntry],
    ) -> GgufSink:
        """Create the files in full size in ``directory``, or take up those of an interrupted job (`fresh` tells which).

        Raises `OutputError` if the disk is too full, or if files are there that this plan would not have made.
        """
        return cls(PreallocatedFiles.open(directory, layout), planned, stored_name, importance)

    @property
    def fresh(self) -> bool:
        """True if the files were created by this `open`."""
        return self._files.fresh

    def write(self, tensor: QuantizedTensor, start_row: int = 0) -> None:
        """Store the blocks of a quantised matrix, or of its rows from ``start_row`` on. Raises `OutputError` for a
        full disk."""
        place = self._places[tensor.name]
        assert tensor.scheme == place.planned.scheme, f"{tensor.name}: planned {place.planned.scheme}"
        blocks = tensor.stored["blocks"]
        assert isinstance(place.planned.scheme, GgmlScheme)
        assert blocks.shape[1] == place.planned.scheme.block.row_bytes(place.planned.info.shape[-1]), tensor.name
        self._put(place, start_row * blocks.shape[1], blocks)

    def write_kept(self, name: str, start_row: int, tensor: Tensor) -> None:
        """Store rows ``[start_row, start_row + len(tensor))`` of a kept tensor, cast to its planned dtype.

        Raises `SchemeError` if a finite value would become infinite, `OutputError` for a full disk.
        """
        place = self._places[name]
        info = place.planned.kept_info
        assert tuple(tensor.shape[1:]) == info.shape[1:], f"{name}: rows of {list(tensor.shape[1:])}"
        self._put(place, start_row * (info.nbytes // info.shape[0]), cast_to(name, tensor, info.dtype))

    def write_constants(self, constants: Mapping[str, Sequence[float]]) -> None:
        """Store float32 vectors that no checkpoint has, by GGUF name, unless the files of an interrupted job hold
        them."""
        for name, values in constants.items():
            data = struct.pack(f"<{len(values)}f", *values)
            if self._files.read(name) != data:
                self._files.write(name, 0, data)

    def wants_importance(self, name: str) -> bool:
        """Whether imatrix.gguf has an entry for this linear. One that is stored in parts, as another output of the same
        pass quantises it, has none."""
        return name in self._places and self._places[name].name in self._importance

    def write_importance(self, name: str, importance: Tensor, n_tokens: Sequence[int]) -> None:
        """Fill the imatrix entries of a linear. importance (B, in) float32: mean squares; n_tokens: tokens of each row.

        One row for a tensor of several heads: all of them read the same.
        """
        stored, expert = self._stored_name(name)
        if expert is None and len(importance) == 1:
            importance = importance.expand(self._importance[stored].n_matrices, -1)
        for suffix, values in imatrix_tensors(importance.cpu().numpy(), n_tokens).items():
            self._files.write(f"{stored}{suffix}", (expert or 0) * values.nbytes, values.tobytes())

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        self._files.sync()

    def written(self) -> tuple[WrittenRange, ...]:
        """What was written since this was asked last."""
        return self._files.written()

    def finish(self, steps: Steps | None = None) -> dict[str, str]:
        """Sync, and return file name -> sha256 (hex). Raises `OutputError` if the files no longer hold what ``steps``
        wrote."""
        return self._files.sha256(steps)

    def close(self) -> None:
        """Sync and give the file descriptors back, without finishing: an interrupted job."""
        self._files.sync()

    def _put(self, place: _Place, start: int, tensor: Tensor) -> None:
        data = bytes_of(tensor)
        assert start + len(data) <= nbytes_of(place.planned), f"{place.planned.name}: too many rows"
        self._files.write(place.name, place.offset + start, data)


def kinds_by_weights(planned: Iterable[PlannedTensor]) -> Mapping[str, int]:
    """Weights stored in each type."""
    totals: dict[str, int] = {}
    for tensor in planned:
        totals[kind_of(tensor)] = totals.get(kind_of(tensor), 0) + tensor.info.numel
    return totals
