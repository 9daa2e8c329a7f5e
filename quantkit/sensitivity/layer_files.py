"""layer-NNNNN.safetensors: what the pass keeps of one decoder layer, so that anyone can take the gradients of its
linears' outputs by a backward of one sublayer.

    input          (rows, tokens, hidden)   the residual stream before the layer
    gradient.K     (rows, tokens, hidden)   the gradient of the loss at the output of sublayer K, the residual included

Files are made in full size before the work begins, and written by rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from quantkit.calibrate.hidden_states import RowStore, write_exactly
from quantkit.documents.sensitivity import FisherJob
from quantkit.errors import OutputError, SourceError
from quantkit.formats.casting import bytes_of
from quantkit.formats.preallocated import FileLayout, FilesLayout, PreallocatedFiles, disk_errors
from quantkit.formats.safetensors.header import read_header
from quantkit.formats.safetensors.writer import shard_of
from quantkit.formats.shard_files import ShardFiles, read_into
from quantkit.tensors import DTYPES, TensorInfo

INPUT = "input"
_AT_ONCE = 64 * 2**20
"""Bytes that are read or written at once, but at least one row."""


def file_name(layer: int) -> str:
    """Of a layer's file."""
    return f"layer-{layer:05d}.safetensors"


def gradient_name(sublayer: int) -> str:
    """Of the tensor of gradients at a sublayer's output."""
    return f"gradient.{sublayer}"


def layout_of(job: FisherJob, layer: int) -> FileLayout:
    """A layer's file."""
    names = (INPUT, *map(gradient_name, range(job.sublayers[layer])))
    shape = (job.rows, job.length, job.hidden)
    return shard_of(file_name(layer), [TensorInfo(name, shape, job.dtype) for name in names]).layout


class LayerFiles:
    """The files of a pass that goes on."""

    def __init__(self, folder: Path, job: FisherJob, *, begun: bool) -> None:
        """Make the files, or take up those of an interrupted pass. ``begun``: something was written into them. Raises
        `OutputError` if the disk has no room, if a file is not the planned one, or if what was begun is gone."""
        self._folder, self._job = folder, job
        self._layouts = tuple(layout_of(job, layer) for layer in range(len(job.sublayers)))
        gone = [one.file for one in self._layouts if begun and not (folder / one.file).exists()]
        if gone:
            raise OutputError(f"{folder}: {gone[0]} of the unfinished pass is gone.", hint="Begin anew with --restart.")
        # Without the names of tensors, which are the same in each file: rows are written here.
        nameless = tuple(FileLayout(one.file, one.header, {}, one.nbytes) for one in self._layouts)
        PreallocatedFiles.open(folder, FilesLayout(nameless, ("*.safetensors*",)))

    def save(self, layer: int, name: str, store: RowStore) -> None:
        """Write a whole tensor, and return when it is on the disk."""
        layout, row_bytes = self._layouts[layer], _row_bytes(self._job)
        path = self._folder / layout.file
        with disk_errors(path):
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                for start, stop in _parts(self._job):
                    rows = store.read(start, stop).to(_dtype(self._job))
                    write_exactly(fd, bytes_of(rows), layout.places[name].offset + start * row_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)

    def load(self, layer: int, name: str, store: RowStore) -> None:
        """Fill ``store`` with a whole tensor."""
        path = self._folder / self._layouts[layer].file
        fill(path, self._layouts[layer].places[name].offset, self._job, store)


def _parts(job: FisherJob) -> Iterator[tuple[int, int]]:
    """[start, stop) of the rows that are moved at once."""
    step = max(1, _AT_ONCE // _row_bytes(job))
    for start in range(0, job.rows, step):
        yield start, min(start + step, job.rows)


def fill(path: Path, offset: int, job: FisherJob, store: RowStore, rows: Sequence[int] | None = None) -> None:
    """Fill ``store`` from the tensor at a file's byte ``offset``, with all of its rows or with ``rows``. Raises
    `SourceError` if the file ends early."""
    files = ShardFiles(path.parent, {path.name: _size(path)})
    spans = _parts(job) if rows is None else ((row, row + 1) for row in rows)
    place = 0
    try:
        with files.borrow(path.name) as file:
            for start, stop in spans:
                part = torch.empty(stop - start, job.length, job.hidden, dtype=_dtype(job))
                read_into(file, part, offset + start * _row_bytes(job), str(path))
                store.write(place, part)
                place += stop - start
    finally:
        files.close()


def check_file(folder: Path, job: FisherJob, layer: int) -> dict[str, int]:
    """Where each tensor of a finished layer's file begins. Raises `SourceError` in one line for a file that is missing,
    truncated, or not the job's."""
    path = folder / file_name(layer)
    stored = read_header(path)
    for name, place in layout_of(job, layer).places.items():
        found = stored.get(name)
        shape = (job.rows, job.length, job.hidden)
        if found is None or found.info != TensorInfo(name, shape, job.dtype):
            what = "is missing" if found is None else f"is {found.info.dtype} {list(found.info.shape)}"
            raise SourceError(
                f"{path}: {name} {what}, {job.dtype} {list(shape)} of {place.nbytes:,} bytes was needed.",
                hint="Make the folder anew: quantkit sensitivity SOURCE -o FOLDER --restart.",
            )
    return {name: tensor.start for name, tensor in stored.items()}


def _row_bytes(job: FisherJob) -> int:
    return job.length * job.hidden * DTYPES[job.dtype][0]


def _size(path: Path) -> int:
    with disk_errors(path):
        return path.stat().st_size


def _dtype(job: FisherJob) -> torch.dtype:
    return getattr(torch, DTYPES[job.dtype][1])
