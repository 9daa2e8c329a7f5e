"""A GGUF model on disk, ours or foreign: one file, or all files of a split set as one.

What enters is a path; what leaves is the key-values, the place of every tensor, and bytes of tensors on demand. Headers
are checked when the reader is opened (see `header`); no tensor is read before `read` is called, and torch is imported
there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.gguf.header import GgufHeader, TensorEntry, read_gguf_header
from quantkit.formats.gguf.layout import split_name
from quantkit.formats.gguf.values import Scalar, Value
from quantkit.formats.safetensors.header import printable
from quantkit.formats.shard_files import ShardFiles
from quantkit.formats.storage import FileState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_SAMPLE_BYTES = 4096
_PIECE_BYTES = 1 << 20
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GgufReader:
    """A model's key-values and tensors. An open resource: use it in ``with``, or `close` it."""

    def __init__(self, path: Path) -> None:
        """``path``: a .gguf file (any of a split set), or a folder that holds one model.

        Raises `SourceError` for a damaged or hostile file, a split set that lacks a file or contradicts itself, and a
        folder with no or several models.
        """
        self.headers = _headers(path)
        """One for each file, in their order."""
        self.directory = (path if path.is_dir() else path.parent).absolute()
        self.key_values: Mapping[str, Value] = self.headers[0].key_values
        self.tensors: Mapping[str, TensorEntry] = _joined(self.directory, self.headers)
        self._files = ShardFiles(self.directory, {header.file: header.size for header in self.headers})

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    @property
    def path(self) -> Path:
        """The first file: what llama.cpp is given."""
        return self.directory / self.headers[0].file

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the model, in their order."""
        return tuple(self.directory / header.file for header in self.headers)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without headers and padding."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def get(self, key: str) -> Scalar | tuple[Scalar, ...] | None:
        """Content of a key-value, None if the file lacks it."""
        found = self.key_values.get(key)
        return None if found is None else found.value

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.directory / self.tensors[name].file

    def states(self) -> dict[str, FileState]:
        """By the name of each file what tells it from another, without reading it."""
        found: dict[str, FileState] = {}
        for header in self.headers:
            with self._files.borrow(header.file) as file:
                found[header.file] = file.state
        return found

    def fingerprint(self) -> str:
        """sha256 (hex) over each file's name, size, header, and three samples of its data."""
        digest = hashlib.sha256()
        for header in self.headers:
            digest.update(f"{header.file}\0{header.size}".encode())
            start = min((entry.offset for entry in header.tensors.values()), default=header.size)
            with self._files.borrow(header.file) as file:
                for at in range(0, start, _PIECE_BYTES):
                    digest.update(file.pread(min(_PIECE_BYTES, start - at), at))
                for quarter in (1, 2, 3):
                    digest.update(file.pread(_SAMPLE_BYTES, start + (header.size - start) * quarter // 4))
        return digest.hexdigest()

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> Tensor:
        """Bytes ``[start, start + nbytes)`` of a tensor's data (all by default) as uint8 on the CPU."""
        import torch

        return torch.from_numpy(self.read_array(name, start, nbytes))

    def read_array(self, name: str, start: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """Bytes of a tensor's data, as `read` gives them, as a numpy array, without torch. Raises `SourceError` if
        the file was changed or cut meanwhile."""
        import numpy as np

        entry = self.tensors[name]
        count = entry.nbytes - start if nbytes is None else nbytes
        assert 0 <= start <= start + count <= entry.nbytes, f"{name}: {count} bytes at {start} of {entry.nbytes}"
        array = np.empty(count, np.uint8)
        if count:
            with self._files.borrow(entry.file) as file:
                file.fill(array.data, entry.offset + start, f"{self.directory / entry.file}: {name}")
        return array


def _headers(path: Path) -> tuple[GgufHeader, ...]:
    first = _model_in(path) if path.is_dir() else path
    header = read_gguf_header(first)
    count = _split_number(first, header, "split.count") or 1
    match = _SPLIT_NAME.fullmatch(first.name)
    if count == 1:
        if match and int(match[3]) > 1:
            raise SourceError(
                f"{first}: is named as one of {int(match[3])} files, but its header has no split.count.",
                hint="It may be a plain part of a file: join the parts with `cat`.",
            )
        return (header,)
    if not match or int(match[3]) != count:
        raise SourceError(
            f"{first}: is one of {count:,} files by its header (split.count), but not by its name.",
            hint=f"Name the files {split_name('<name>', 0, count)} and so on, as they were.",
        )
    paths = [first.with_name(split_name(match[1], number, count)) for number in range(count)]
    missing = [other.name for other in paths if not other.exists()]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{first}: {missing[0]}{more} of the {count:,} files of this model is missing.", hint="Fetch all files."
        )
    headers = tuple(header if other == first else read_gguf_header(other) for other in paths)
    _check_splits(paths, headers)
    return headers


def _check_splits(paths: list[Path], headers: tuple[GgufHeader, ...]) -> None:
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        for key, needed in (("split.no", number), ("split.count", len(paths))):
            found = _split_number(path, header, key)
            if found != needed:
                raise SourceError(f"{path}: {key} is {found}, {needed} was needed.", hint="Fetch the file again.")
    total = sum(len(header.tensors) for header in headers)
    for path, header in zip(paths, headers, strict=True):
        claimed = _split_number(path, header, "split.tensors.count")
        if claimed is not None and claimed != total:
            raise SourceError(
                f"{path}: claims {claimed:,} tensors in all files (split.tensors.count), they hold {total:,}.",
                hint="Files of different models are mixed: fetch them again.",
            )


def _split_number(path: Path, header: GgufHeader, key: str) -> int | None:
    found = header.key_values.get(key)
    if found is None:
        return None
    value = found.value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SourceError(f"{path}: {key} is {printable(repr(value))}, a number was needed.")
    return value


def _model_in(folder: Path) -> Path:
    """The one model of a folder: imatrix files beside it are none, and of a split set the first file stands for all."""
    candidates: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        match = _SPLIT_NAME.fullmatch(path.name)
        candidates.setdefault(f"{match[1]}-of-{match[3]}" if match else path.name, path)
    models = [path for path in candidates.values() if _is_model(path)]
    if len(models) != 1:
        names = ", ".join(path.name for path in models[:4]) + (", ..." if len(models) > 4 else "")
        found = f"holds {len(models)} GGUF models ({names})" if models else "holds no GGUF model"
        raise SourceError(f"{folder}: {found}, one was needed.", hint="Give the path of a .gguf file.")
    return models[0]


def _is_model(path: Path) -> bool:
    kind = read_gguf_header(path).key_values.get("general.type")
    return kind is None or kind.value == "model"


def _joined(directory: Path, headers: tuple[GgufHeader, ...]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in tensors:
                raise SourceError(f"{directory / header.file}: the tensor {name} is also in {tensors[name].file}.")
            tensors[name] = entry
    return tensors
