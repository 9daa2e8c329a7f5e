"""What a format of compressed-tensors is; `quantkit.formats.layouts.compressed_tensors` joins them to a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from quantkit.errors import SourceError
from quantkit.formats.folder import PackedLinear
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored


@runtime_checkable
class StoredLinear(PackedLinear, Protocol):
    """A `PackedLinear` whose codes and scales can be taken over as they are."""

    def read_stored(self, raw: SafetensorsSource) -> Stored:
        """All of it by the names of its scheme's ``decode``, as in `QuantizedTensor`. Raises `SourceError` for scales
        that are no numbers."""
        ...

    def read_scale(self, raw: SafetensorsSource) -> Tensor:
        """The scales alone, (out, groups) in their dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Packing:
    """One format.

    ``format``: its name. ``stored``, ``pack``: as in `FolderLayout`. ``weights``: the ``weights`` section of a config
    group; ``inputs``: its ``input_activations``.
    ``scheme(where, weights, inputs)``: what the two sections say, ``inputs`` {} where inputs stay as they are; None if
    it is another format's; raises `SourceError` for what they say wrongly. ``find(raw, name, scheme)``: the linear
    ``name`` in this scheme, headers checked; raises `SourceError`.
    """

    format: str
    stored: Callable[[PlannedTensor], tuple[TensorInfo, ...]]
    pack: Callable[[QuantizedTensor], Mapping[str, Tensor]]
    weights: Callable[[Scheme], dict[str, object]]
    inputs: Mapping[str, object] | None
    scheme: Callable[[str, Mapping[str, object], Mapping[str, object]], Scheme | None]
    find: Callable[[SafetensorsSource, str, Scheme], StoredLinear]


def require(raw: SafetensorsSource, name: str, needed: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a linear ``name`` unless each of its tensors has the dtype and shape that is needed."""
    stored, where = raw.infos(), f"{raw.path_of(f'{name}_packed')}: {printable(name)}"
    for part, (dtype, shape) in needed.items():
        found = stored.get(part)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise SourceError(f"{where}: {part.rpartition('.')[2]} is {what}, needed {dtype} {list(shape)}.")


def parts_of(raw: SafetensorsSource, name: str, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Those tensors of a linear that are there."""
    return tuple(name + suffix for suffix in suffixes if name + suffix in raw.infos())
