"""compressed-tensors' ``mxfp8-quantized``, its preset MXFP8.

    P.weight        F8_E4M3 (out, in)
    P.weight_scale  uint8 (out, in / 32)    exponents, 2**(n - 127)

Inputs are rounded to MXFP8 too while serving, by runtimes that compute in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.folder import Rows, by_runs
from quantkit.formats.layouts.packing import Packing
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import Mxfp8Scheme, QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored

_WEIGHTS: dict[str, object] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "dynamic": False,
    "actorder": None,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_INPUTS: dict[str, object] = {**_WEIGHTS, "dynamic": True}


def _needed(name: str, shape: tuple[int, int]) -> tuple[TensorInfo, TensorInfo]:
    """What a linear (out, in) is stored as."""
    n_out, n_in = shape
    return TensorInfo(name, shape, "F8_E4M3"), TensorInfo(f"{name}_scale", (n_out, n_in // 32), "U8")


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    assert isinstance(tensor.scheme, Mxfp8Scheme), f"{tensor.name}: {tensor.scheme}"
    n_out, n_in = tensor.info.shape
    return _needed(tensor.name, (n_out, n_in))


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    import torch

    codes = tensor.stored["codes"].view(torch.float8_e4m3fn)
    return {tensor.name: codes, f"{tensor.name}_scale": tensor.stored["scale"]}


def _scheme(where: str, weights: Mapping[str, object], inputs: Mapping[str, object]) -> Scheme | None:
    """Whatever is said of the inputs: the weights are the same (preset MXFP8A16)."""
    keys = ("num_bits", "type", "strategy", "group_size")
    return Mxfp8Scheme() if all(weights.get(key) == _WEIGHTS[key] for key in keys) else None


@dataclass(frozen=True, slots=True)
class _Linear:
    """A `StoredLinear`."""

    scheme: Mxfp8Scheme
    info: TensorInfo
    parts: tuple[str, ...]

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`. Only these rows are read."""
        return by_runs(rows, self.info.shape[1], partial(self._run, raw))

    def read_stored(self, raw: SafetensorsSource) -> Stored:
        """See `StoredLinear`."""
        return self._rows(raw, 0, self.info.shape[0])

    def read_scale(self, raw: SafetensorsSource) -> Tensor:
        """See `StoredLinear`."""
        return raw.read(self.parts[1])

    def _run(self, raw: SafetensorsSource, start: int, stop: int) -> Tensor:
        return self.scheme.decode(**self._rows(raw, start, stop))

    def _rows(self, raw: SafetensorsSource, start: int, stop: int) -> Stored:
        import torch

        codes, scale = (raw.read(name, (start, stop)) for name in self.parts)
        return {"codes": codes.view(torch.uint8), "scale": scale}


def _find(raw: SafetensorsSource, name: str, scheme: Scheme) -> _Linear:
    assert isinstance(scheme, Mxfp8Scheme), f"{scheme}"
    stored = raw.infos()
    info, scale = stored[name], stored[f"{name}_scale"]
    fits = len(info.shape) == 2 and not info.shape[1] % scheme.group_size
    needed = _needed(name, (info.shape[0], info.shape[1])) if fits else ()
    if scale not in needed:
        raise SourceError(
            f"{raw.path_of(name)}: {printable(name)}: weight_scale is {scale.dtype} {list(scale.shape)}, which does "
            f"not fit {list(info.shape)} in groups of 32 with a byte each."
        )
    return _Linear(scheme, TensorInfo(name, info.shape, "F32"), tuple(part.name for part in needed))


MXFP8_QUANTIZED = Packing("mxfp8-quantized", _stored, _pack, lambda _: dict(_WEIGHTS), _INPUTS, _scheme, _find)
