"""Where every byte of a GGUF model goes: headers complete, tensors at aligned offsets, cut into files.

What enters are the key-values and the tensors in their order; what leaves is the layout that `preallocated` makes files
of. A file is: magic, version 3, counts, key-values, tensor infos (dimensions with the contiguous one first, offsets
from the start of the data), zeros up to the alignment, and the tensors, each padded with zeros to the alignment.
Sources: ggml/include/gguf.h and tools/gguf-split of llama.cpp; the same bytes as gguf-py writes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantkit.errors import PlanError
from quantkit.formats.gguf.types import WRITABLE
from quantkit.formats.gguf.values import Value, encode_key_values, encode_string, i32, u16, u32
from quantkit.formats.preallocated import ByteRange, FileLayout, FilesLayout

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""What llama.cpp assumes when general.alignment is absent, and always writes."""
MAX_NAME_BYTES = 63
"""llama.cpp refuses a file with a longer tensor name (GGML_MAX_NAME less the terminator)."""
MAX_DIMS = 4
MAX_FILES = 65_535
"""split.count is a u16."""
PATTERN = "*.gguf*"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file. ``shape`` in numpy's order, (out, in) or (experts, out, in): the last dimension is the
    contiguous one; ``kind``: a key of `types.WRITABLE`."""

    name: str
    shape: tuple[int, ...]
    kind: str

    def __post_init__(self) -> None:
        assert self.kind in WRITABLE, f"{self.name}: {self.kind}"
        assert 1 <= len(self.shape) <= MAX_DIMS, f"{self.name}: {self.shape}"
        assert min(self.shape) > 0, f"{self.name}: {self.shape}"
        assert len(self.name.encode()) <= MAX_NAME_BYTES, f"{self.name}: more than {MAX_NAME_BYTES} bytes"
        block = WRITABLE[self.kind].block
        assert self.shape[-1] % block == 0, f"{self.name}: rows of {self.shape[-1]} are no multiple of {block}"

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return WRITABLE[self.kind].data_bytes(self.shape)


def layout_gguf(
    stem: str,
    key_values: Mapping[str, Value],
    tensors: Sequence[GgufTensor],
    max_shard_bytes: int | None = None,
    alignment: int = ALIGNMENT,
) -> FilesLayout:
    """Layout of ``<stem>.gguf``, or of ``<stem>-00001-of-0000N.gguf`` etc. if the data exceeds ``max_shard_bytes``.

    A tensor is never cut: a file exceeds the limit (bytes of tensor data) only for one large tensor. Of a split model
    the first file has all ``key_values``; each has its number, their count and the count of all tensors.

    Raises `PlanError` if more than 65,535 files would be needed, `ConfigError` for a value that does not fit its type.
    """
    assert alignment > 0, alignment
    assert alignment & (alignment - 1) == 0, f"alignment {alignment} is no power of two"
    assert "general.alignment" not in key_values, "the alignment is written by the layout"
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor is planned twice"
    # llama.cpp needs the alignment in every file where it is not the usual one, since it reads each by itself.
    aligned = {} if alignment == ALIGNMENT else {"general.alignment": u32(alignment)}
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        files = [_file(f"{stem}.gguf", {**key_values, **aligned}, shards[0], alignment)]
        return FilesLayout(tuple(files), (PATTERN,))
    if len(shards) > MAX_FILES:
        raise PlanError(
            f"{stem}: {len(shards):,} files of at most {max_shard_bytes:,} bytes would be needed, "
            f"GGUF allows {MAX_FILES:,}.",
            hint="Use a larger split_max_size.",
        )
    files: list[FileLayout] = []
    for number, shard in enumerate(shards):
        split = {
            "split.no": u16(number),
            "split.count": u16(len(shards)),
            "split.tensors.count": i32(len(tensors)),
        }
        own = {**(key_values if number == 0 else {}), **aligned, **split}
        files.append(_file(split_name(stem, number, len(shards)), own, shard, alignment))
    return FilesLayout(tuple(files), (PATTERN,))


def split_name(stem: str, number: int, count: int) -> str:
    """File ``number`` (from 0) of ``count``, as llama.cpp builds the name (llama_split_path)."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """``nbytes`` rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


def _shards(tensors: Iterable[GgufTensor], max_shard_bytes: int | None) -> list[list[GgufTensor]]:
    shards: list[list[GgufTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and max_shard_bytes is not None and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _file(file: str, key_values: Mapping[str, Value], tensors: list[GgufTensor], alignment: int) -> FileLayout:
    offsets: list[int] = []
    end = 0
    for tensor in tensors:
        offsets.append(end)
        end += padded(tensor.nbytes, alignment)
    counts = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(key_values))
    infos = b"".join(_tensor_info(tensor, offset) for tensor, offset in zip(tensors, offsets, strict=True))
    header = counts + encode_key_values(key_values) + infos
    header += bytes(padded(len(header), alignment) - len(header))
    places = {
        tensor.name: ByteRange(len(header) + offset, tensor.nbytes)
        for tensor, offset in zip(tensors, offsets, strict=True)
    }
    return FileLayout(file, header, places, len(header) + end)


def _tensor_info(tensor: GgufTensor, offset: int) -> bytes:
    n_dims = len(tensor.shape)
    dims = struct.pack(f"<I{n_dims}Q", n_dims, *reversed(tensor.shape))
    return encode_string(tensor.name) + dims + struct.pack("<IQ", WRITABLE[tensor.kind].id, offset)
