"""Folders of safetensors whose linears are stored packed: what a layout is, the one sink that writes every layout, and
the one source that reads every layout back.

A layout says how *quantised linears* are stored, in pure functions of one file (`quantkit.formats.layouts`). All else
is common: kept tensors lie under their own names, shards are preallocated and can be resumed, and a source shows each
packed linear decoded, float32, under its official name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from quantkit.errors import OutputError, SchemeError, SourceError
from quantkit.formats.casting import bytes_of, cast_to
from quantkit.formats.checksums import WrittenRange
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.preallocated import Steps
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource, row_ranges
from quantkit.formats.safetensors.writer import MAX_SHARD_BYTES, ShardWriter, layout_shards
from quantkit.formats.source import quantization_section, read_config
from quantkit.formats.storage import LOCAL, Storage
from quantkit.schemes import QuantizedTensor, Scheme
from quantkit.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Rows = slice | list[int]
"""Rows of a matrix: a slice with start and stop, or any rows in any order."""
ROWS_AT_ONCE = 128
"""Output rows that are decoded together: temporaries stay in the cache. A multiple of 8."""


class PackedLinear(Protocol):
    """A linear as a folder stores it."""

    @property
    def info(self) -> TensorInfo:
        """The tensor as the source lists it: official name, (out, in), F32."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that store it, alone or with other linears."""
        ...

    @property
    def scheme(self) -> Scheme | None:
        """What it is stored in, None where no scheme of quantkit says the same."""
        ...

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """Some rows (n, in) float32 on the CPU, from the stored tensors of ``raw``; `by_runs` helps where neighbouring
        rows lie together. Raises `SourceError` for stored values that cannot be."""
        ...


FindLinears = Callable[[SafetensorsSource, Mapping[str, object]], Mapping[str, PackedLinear]]
"""(stored tensors, quantization_config) -> the packed linears by official name. Raises `SourceError`."""


@dataclass(frozen=True, slots=True)
class FolderReader:
    """The half of a layout that reads. ``label``: what reports call it. ``find``: the packed linears of a folder."""

    label: str
    find: FindLinears


def _none(planned: Sequence[PlannedTensor]) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class FolderLayout:
    """How a folder stores quantised linears.

    ``check(name, shape, scheme)``: raises `SchemeError` unless a linear (out, in) in this scheme can be stored.
    ``stored``: exact names, shapes and dtypes of what the file holds for a quantised tensor, in file order.
    ``pack``: the same tensors, filled with what a method or the source gave, on any device. Floats of 16 and 32 bits
    among them are scales, and must be finite.
    ``config``: quantization_config of config.json; {} if nothing is quantised.
    ``problems``: one line for each thing that this config could not say of a plan, such as two schemes where there is
    room for one.
    """

    reader: FolderReader
    check: Callable[[str, tuple[int, ...], Scheme], None]
    stored: Callable[[PlannedTensor], tuple[TensorInfo, ...]]
    pack: Callable[[QuantizedTensor], Mapping[str, Tensor]]
    config: Callable[[Sequence[PlannedTensor]], Mapping[str, object]]
    problems: Callable[[Sequence[PlannedTensor]], list[str]] = _none

    def infos(self, tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
        """Every tensor that the file holds for a planned one, quantised or kept: so the exact bytes."""
        return (tensor.kept_info,) if tensor.scheme is None else self.stored(tensor)


# --- writing ----------------------------------------------------------------------------------------------------------


class FolderSink:
    """A checkpoint being written. Every tensor's place is known when it is opened, so tensors come in any order and may
    come again; the bytes of the files do not depend on the order. Nothing is held in memory but the tensor being
    written."""

    def __init__(self, layout: FolderLayout, writer: ShardWriter, planned: Sequence[PlannedTensor]) -> None:
        self._layout = layout
        self._writer = writer
        self._planned = {tensor.name: tensor for tensor in planned}
        self._written: set[str] = set()

    @classmethod
    def open(
        cls,
        layout: FolderLayout,
        directory: Path,
        planned: Sequence[PlannedTensor],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> FolderSink:
        """Create the shards in full size in ``directory``, or take up those of an interrupted job (`fresh` tells
        which).

        Raises `OutputError` if the disk is too full, or if files are there that this plan would not have made.
        """
        shards = layout_shards(map(layout.infos, planned), max_shard_bytes)
        return cls(layout, ShardWriter.open(directory, shards), planned)

    @property
    def fresh(self) -> bool:
        """True if the files were created by this `open`: a journal that says tensors are written is then not theirs."""
        return self._writer.fresh

    @property
    def nbytes(self) -> int:
        """Size of all shards, headers included."""
        return self._writer.nbytes

    def write(self, tensor: QuantizedTensor, start_row: int = 0) -> None:
        """Store a quantised linear, always whole. Raises `SchemeError` for a scale that is not finite, `OutputError`
        for a full disk."""
        planned = self._planned[tensor.name]
        assert start_row == 0, f"{tensor.name}: rows of a packed linear cannot be stored alone"
        assert planned.scheme == tensor.scheme, f"{tensor.name}: planned {planned.scheme}, got {tensor.scheme}"
        parts = self._layout.pack(tensor)
        needed = sorted(self._layout.stored(planned), key=lambda info: -info.nbytes)
        assert set(parts) == {info.name for info in needed}, f"{tensor.name}: packed as {sorted(parts)}"
        _check_scales(tensor.name, parts.values())
        # The smallest last: it is what tells `finish` of a resumed job that the linear was written.
        for info in needed:
            self._put(info, parts[info.name])
        self._written.add(tensor.name)

    def write_kept(self, name: str, start_row: int, tensor: Tensor) -> None:
        """Store rows ``[start_row, start_row + len(tensor))`` of a kept tensor, cast to its planned dtype (round to
        nearest even).

        Raises `SchemeError` if a finite value would become infinite, `OutputError` for a full disk.
        """
        info = self._planned[name].kept_info
        assert tuple(tensor.shape[1:]) == info.shape[1:], f"{name}: rows of {list(tensor.shape[1:])}"
        assert start_row + (len(tensor) if tensor.ndim else 1) <= (info.shape[0] if info.shape else 1), (
            f"{name}: too many rows"
        )
        cast = cast_to(name, tensor, info.dtype)
        row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
        self._writer.write(name, start_row * row_bytes, bytes_of(cast))

    def wants_importance(self, name: str) -> bool:
        """Folders have no place for it."""
        return False

    def write_importance(self, name: str, importance: Tensor, n_tokens: Sequence[int]) -> None:
        """See `wants_importance`."""
        raise AssertionError(f"{name}: a folder has no place for importance")

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        self._writer.sync()

    def written(self) -> tuple[WrittenRange, ...]:
        """What was written since this was asked last."""
        return self._writer.written()

    def finish(self, steps: Steps | None = None) -> dict[str, str]:
        """Write the index (if there are several shards or not, runtimes read both), sync, and return file name ->
        sha256 (hex).

        Raises `OutputError` if a quantised linear of the plan was never written, or the shards no longer hold what
        ``steps`` wrote.
        """
        self._refuse_unwritten()
        return self._writer.finish(steps)

    def close(self) -> None:
        """Sync and give the file descriptors back, without finishing: an interrupted job."""
        self._writer.sync()

    def _put(self, info: TensorInfo, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == info.shape, f"{info.name}: planned {list(info.shape)}, got {list(tensor.shape)}"
        assert str(tensor.dtype) == f"torch.{DTYPES[info.dtype][1]}", (
            f"{info.name}: planned {info.dtype}, got {tensor.dtype}"
        )
        self._writer.write(info.name, 0, bytes_of(tensor))

    def _refuse_unwritten(self) -> None:
        linears = (tensor for tensor in self._planned.values() if tensor.scheme is not None)
        missing = [tensor.name for tensor in linears if tensor.name not in self._written and self._is_blank(tensor)]
        if missing:
            raise OutputError(
                f"{self._writer.directory}: {missing[0]} and {len(missing) - 1:,} other linears were never written.",
                hint="The journal and the files disagree: start again with --restart.",
            )

    def _is_blank(self, tensor: PlannedTensor) -> bool:
        """Whether nothing but the zeros of new files is stored of a linear. Its smallest part nearly always tells."""
        infos = sorted(self._layout.stored(tensor), key=lambda info: info.nbytes)
        return not any(any(self._writer.read(info.name)) for info in infos)


def _check_scales(name: str, parts: Iterable[Tensor]) -> None:
    import torch

    for part in parts:
        if part.dtype in (torch.float16, torch.bfloat16, torch.float32) and not torch.isfinite(part).all():
            raise SchemeError(
                f"{name}: a scale is NaN or infinite.",
                hint="The weight or its Hessian holds values that are no numbers.",
            )


# --- reading ----------------------------------------------------------------------------------------------------------


class FolderSource:
    """Decoded tensors of one folder, a `RowSource`: to evaluate, or to quantise anew. ``config``: the raw config.json;
    ``raw``: what is stored. Reads are thread-safe; `close` (or ``with``) when done."""

    def __init__(self, directory: Path | str, reader: FolderReader, storage: Storage = LOCAL) -> None:
        """Read config.json and headers. Raises `SourceError` for what is damaged, incomplete, or cannot be decoded."""
        self.directory = Path(directory)
        self.config: Mapping[str, object] = read_config(self.directory)
        where = str(self.directory / "config.json")
        section = object_of(where, "quantization_config", quantization_section(self.config))
        self.raw = SafetensorsSource(self.directory, storage=storage)
        try:
            self._linears = reader.find(self.raw, section)
            self._infos = {info.name: info for info in self._decoded_infos()}
        except SourceError:
            self.raw.close()
            raise

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by official name; packed linears as F32."""
        return self._infos

    def scheme(self, name: str) -> Scheme | None:
        """What a linear is stored in; None for other tensors, and where no scheme of quantkit says the same."""
        linear = self._linears.get(name)
        return None if linear is None else linear.scheme

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor or rows ``[start, stop)``, on the CPU."""
        linear = self._linears.get(name)
        if linear is None:
            return self.raw.read(self._plain(name), rows)
        start, stop = rows or (0, linear.info.shape[0])
        return linear.decode(self.raw, slice(start, stop))

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows in the given order, repeats allowed."""
        linear = self._linears.get(name)
        if linear is None:
            return self.raw.read_rows(self._plain(name), indices)
        n_rows = linear.info.shape[0]
        assert all(0 <= row < n_rows for row in indices), f"{name}: rows {min(indices)} to {max(indices)} of {n_rows}"
        return linear.decode(self.raw, list(indices))

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The tensor in consecutive pieces of its first dimension, each at most ``max_bytes`` (decoded) but at least
        one row."""
        for rows in row_ranges(self._infos[name], max_bytes):
            yield self.read(name, rows)

    def prefetch(self, names: list[str]) -> None:
        """Ask the operating system to read these tensors ahead."""
        stored = self.raw.infos()
        parts = (self._linears[name].parts if name in self._linears else (name,) for name in names)
        self.raw.prefetch([part for own in parts for part in own if part in stored])

    def close(self) -> None:
        """Give the file descriptors back."""
        self.raw.close()

    def __enter__(self) -> FolderSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _plain(self, name: str) -> str:
        """The name, if the tensor means what it holds: FP8 or integers would need scales that nothing here reads."""
        dtype = self._infos[name].dtype if name in self._infos else ""
        if name.endswith(".weight") and dtype.startswith(("F8_", "I", "U")):
            raise SourceError(
                f"{self.raw.path_of(name)}: {printable(name)} is {dtype}, neither packed by the checkpoint's "
                "quant_method nor a plain float."
            )
        return name

    def _decoded_infos(self) -> Iterator[TensorInfo]:
        """The tensors in file order, a linear at the position of its first part. Linears may share parts, as stacked
        experts do."""
        owners: dict[str, list[str]] = {}
        for name, linear in self._linears.items():
            for stored in linear.parts:
                owners.setdefault(stored, []).append(name)
        seen: set[str] = set()
        for name, info in self.raw.infos().items():
            if name not in owners:
                if name in self._linears:
                    raise SourceError(f"{self.raw.path_of(name)}: {printable(name)} is stored packed and plain.")
                yield info
            for owner in owners.get(name, ()):
                if owner not in seen:
                    seen.add(owner)
                    yield self._linears[owner].info


def object_of(where: str, key: str, value: object) -> Mapping[str, object]:
    """A JSON object. Raises `SourceError` for anything else."""
    if not isinstance(value, dict):
        raise SourceError(f"{where}: {key} is {printable(repr(value)[:80])}, an object was needed.")
    return cast("dict[str, object]", value)


def part(raw: SafetensorsSource, name: str, dtypes: Sequence[str], shape: tuple[int | None, ...]) -> TensorInfo:
    """A stored tensor of one of ``dtypes`` and of ``shape`` (None: any length). Raises `SourceError` in one line."""
    info = raw.infos().get(name)
    if info is None:
        raise SourceError(f"{raw.directory}: {printable(name)} is missing.")
    fits = len(info.shape) == len(shape) and all(b in (a, None) for a, b in zip(info.shape, shape, strict=True))
    if info.dtype not in dtypes or not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise SourceError(
            f"{raw.path_of(name)}: {printable(name)} is {info.dtype} {list(info.shape)}, "
            f"{' or '.join(dtypes)} [{wanted}] was needed."
        )
    return info


def from_groups(codes: Tensor, zeros: Tensor, scales: Tensor, weight: Tensor) -> None:
    """(code - zero) * scale into weight (n, in) float32. codes (n, in) of any integers; zeros, scales (n, groups)
    float32, groups of equal size, one after the other."""
    import torch

    grouped = weight.view(*zeros.shape, -1)
    torch.sub(codes.view_as(grouped), zeros.unsqueeze(-1), out=grouped)
    grouped.mul_(scales.unsqueeze(-1))


def row_parts(rows: Rows, at_once: int = ROWS_AT_ONCE) -> Iterator[slice]:
    """Consecutive places of the result that are decoded together: covers len(rows)."""
    n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    yield from (slice(start, min(start + at_once, n)) for start in range(0, n, at_once))


def by_runs(rows: Rows, in_features: int, run: Callable[[int, int], Tensor]) -> Tensor:
    """Rows (n, in) float32 by ``run(start, stop)``, which decodes neighbouring rows: a slice at once, rows of a list
    one by one."""
    import torch

    if isinstance(rows, slice):
        return run(rows.start, rows.stop) if rows.start < rows.stop else torch.empty(0, in_features)
    weight = torch.empty(len(rows), in_features)
    for place, row in enumerate(rows):
        weight[place] = run(row, row + 1)
    return weight
