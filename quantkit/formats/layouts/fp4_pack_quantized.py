"""compressed-tensors' ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``.

    P.weight_packed        uint8 (out, in / 2)        two codes to a byte, the first in the low nibble
    P.weight_scale         F8_E4M3 (out, in / 16)     NVFP4
                           uint8 (out, in / 32)       MXFP4: exponents, 2**(n - 127)
    P.weight_global_scale  F32 (1,)                   NVFP4 only, a divisor

Inputs stay in 16 bits (compressed-tensors' presets NVFP4A16 and MXFP4A16). Files of other tools with the preset NVFP4,
of which the weights are the same, also hold what inputs are divided by:

    P.input_global_scale   F32 (1,)                    P without ``.weight``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.folder import Rows, by_runs
from quantkit.formats.layouts.packing import Packing, parts_of, require
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import Mxfp4Scheme, Nvfp4Scheme, QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored

_PARTS = ("_packed", "_scale", "_global_scale")
INPUT_SCALE = "input_global_scale"


def _needed(name: str, shape: tuple[int, int], scheme: Nvfp4Scheme | Mxfp4Scheme) -> tuple[TensorInfo, ...]:
    """What a linear (out, in) is stored as."""
    n_out, n_in = shape
    scale_dtype = "F8_E4M3" if scheme.shares_scale else "U8"
    infos = (
        TensorInfo(f"{name}_packed", (n_out, n_in // 2), "U8"),
        TensorInfo(f"{name}_scale", (n_out, n_in // scheme.group_size), scale_dtype),
    )
    return (*infos, TensorInfo(f"{name}_global_scale", (1,), "F32")) if scheme.shares_scale else infos


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    scheme, (n_out, n_in) = tensor.scheme, tensor.info.shape
    assert isinstance(scheme, Nvfp4Scheme | Mxfp4Scheme), f"{tensor.name}: {scheme}"
    return _needed(tensor.name, (n_out, n_in), scheme)


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    name, stored = tensor.name, tensor.stored
    codes = stored["codes"]
    parts = {f"{name}_packed": codes[:, ::2] | codes[:, 1::2] << 4, f"{name}_scale": stored["scale"]}
    divisors = stored.get("global_scale")
    if divisors is not None:
        assert bool((divisors == divisors[0]).all()), f"{name}: rows with global scales of their own"
        parts[f"{name}_global_scale"] = divisors[0]
    return parts


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Linear:
    """A `StoredLinear`."""

    scheme: Nvfp4Scheme | Mxfp4Scheme
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

        packed, scale = (raw.read(name, (start, stop)) for name in self.parts[:2])
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
        shared = self.scheme.shares_scale
        beside = {"global_scale": raw.read(self.parts[2]).expand(stop - start, 1)} if shared else {}
        return {"codes": codes, "scale": scale, **beside}


def _find(raw: SafetensorsSource, name: str, scheme: Scheme) -> _Linear:
    assert isinstance(scheme, Nvfp4Scheme | Mxfp4Scheme), f"{scheme}"
    packed = raw.infos()[f"{name}_packed"]
    if len(packed.shape) != 2 or packed.shape[1] * 2 % scheme.group_size:
        raise SourceError(
            f"{raw.path_of(packed.name)}: {printable(name)}: weight_packed is {list(packed.shape)}, rows of whole "
            f"groups of {scheme.group_size} were needed."
        )
    shape = packed.shape[0], packed.shape[1] * 2
    require(raw, name, {info.name: (info.dtype, info.shape) for info in _needed(name, shape, scheme)})
    parts = parts_of(raw, name, _PARTS if scheme.shares_scale else _PARTS[:2])
    parts += parts_of(raw, name.removesuffix("weight"), (INPUT_SCALE,))
    return _Linear(scheme, TensorInfo(name, shape, "F32"), parts)


def _packing(scheme: Nvfp4Scheme | Mxfp4Scheme, strategy: str, scale_dtype: str) -> Packing:
    weights: dict[str, object] = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "scale_dtype": scale_dtype,
        "zp_dtype": scale_dtype,
    }

    def says(where: str, found: Mapping[str, object], inputs: Mapping[str, object]) -> Scheme | None:
        keys = ("num_bits", "type", "strategy", "group_size")
        return scheme if all(found.get(key) == weights[key] for key in keys) else None

    return Packing(f"{scheme.kind}-pack-quantized", _stored, _pack, lambda _: dict(weights), None, says, _find)


NVFP4_PACK_QUANTIZED = _packing(Nvfp4Scheme(), "tensor_group", "torch.float8_e4m3fn")
MXFP4_PACK_QUANTIZED = _packing(Mxfp4Scheme(), "group", "torch.uint8")
