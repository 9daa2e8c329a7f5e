"""A folder whose linears are stored packed, as a `TensorSource`: each appears decoded, float32, under its official
name; every other tensor as it is.

A format gives the linears (what a header says of each, and how rows of it are decoded); the rest is common to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource, row_ranges
from quantkit.formats.source import read_config
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Rows = slice | list[int]
"""Rows of a matrix: a slice with start and stop, or any rows in any order."""
ROWS_AT_ONCE = 128
"""Output rows that are decoded together: temporaries stay in the cache. A multiple of 8."""


class PackedLinear(Protocol):
    """A linear as its format stores it. ``info``: name, (out, in), F32; ``parts``: names of the stored tensors."""

    @property
    def info(self) -> TensorInfo:
        """As it appears."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """What is stored of it."""
        ...

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """Some rows (n, in) float32 on the CPU. Raises `SourceError` for stored values that cannot be."""
        ...


FindLinears = Callable[[SafetensorsSource, Mapping[str, object]], Mapping[str, PackedLinear]]
"""(stored tensors, quantization_config) -> the packed linears by official name. Raises `SourceError`."""


class DecodedLinears:
    """Decoded tensors of one folder. ``config``: the raw config.json. Reads are thread-safe; `close` (or ``with``) when
    done."""

    def __init__(self, directory: Path | str, find: FindLinears) -> None:
        """Read config.json and headers. Raises `SourceError` for what is damaged, incomplete, or cannot be decoded."""
        self.directory = Path(directory)
        self.config: Mapping[str, object] = read_config(self.directory)
        self.raw = SafetensorsSource(self.directory)
        try:
            self._linears = find(self.raw, _section(self.directory, self.config))
            self._infos = {info.name: info for info in self._decoded_infos()}
        except SourceError:
            self.raw.close()
            raise

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by official name; packed linears as F32."""
        return self._infos

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

    def __enter__(self) -> DecodedLinears:
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
        """In file order; a linear in the place of its first part."""
        owners = {part: name for name, linear in self._linears.items() for part in linear.parts}
        seen: set[str] = set()
        for name, info in self.raw.infos().items():
            owner = owners.get(name)
            if owner is None:
                if name in self._linears:
                    raise SourceError(f"{self.raw.path_of(name)}: {printable(name)} is stored packed and plain.")
                yield info
            elif owner not in seen:
                seen.add(owner)
                yield self._linears[owner].info


def _section(directory: Path, config: Mapping[str, object]) -> Mapping[str, object]:
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        raise SourceError(f"{directory / 'config.json'}: quantization_config must be an object.")
    return cast("dict[str, object]", section)


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
