"""compressed-tensors' ``float-quantized`` for FP8 blocks that are kept as the source has them.

P.weight        F8_E4M3 (out, in)
P.weight_scale  F32 (out blocks, in blocks)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from quantkit.errors import SourceError
from quantkit.formats.folder import Rows, by_runs
from quantkit.formats.layouts.packing import Packing, parts_of
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import Float8Scheme, QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored

# DeepSeek's own recipe ("activation_scheme": "dynamic"): inputs are rounded to FP8 per token and 128 channels while
# serving.
_INPUTS: dict[str, object] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "dynamic": True,
}


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    scheme = tensor.scheme
    assert isinstance(scheme, Float8Scheme), f"{tensor.name}: {scheme}"
    scale = TensorInfo(f"{tensor.module}.weight_scale", scheme.scale_shape(tensor.info.shape), "F32")
    return TensorInfo(tensor.name, tensor.info.shape, "F8_E4M3"), scale


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    # float32 is exact, whatever float the source stores scales in.
    return {tensor.name: tensor.stored["codes"], f"{tensor.name}_scale": tensor.stored["scale"].float()}


def _weights(scheme: Scheme) -> dict[str, object]:
    assert isinstance(scheme, Float8Scheme), f"{scheme}"
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": list(scheme.block_size),
        "group_size": None,
        "dynamic": False,
        "actorder": None,
    }


def _scheme(where: str, weights: Mapping[str, object], inputs: Mapping[str, object]) -> Scheme | None:
    if (weights.get("type"), weights.get("num_bits"), weights.get("strategy")) != ("float", 8, "block"):
        return None
    value = weights.get("block_structure")
    items = cast("list[object]", value) if isinstance(value, list) else []
    match items:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Float8Scheme(block_size=(rows, columns))
        case _:
            raise SourceError(
                f"{where}: block_structure is {printable(repr(value))}, two positive integers were needed."
            )


@dataclass(frozen=True, slots=True)
class _Linear:
    """A `StoredLinear`."""

    scheme: Float8Scheme
    info: TensorInfo
    parts: tuple[str, ...]

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`. Only these rows are read, and those that share a block with them."""
        return by_runs(rows, self.info.shape[1], partial(_read, raw, self.info.name, self.scheme))

    def read_stored(self, raw: SafetensorsSource) -> Stored:
        """See `StoredLinear`."""
        return {"codes": raw.read(self.info.name), "scale": self.read_scale(raw)}

    def read_scale(self, raw: SafetensorsSource) -> Tensor:
        """See `StoredLinear`."""
        return raw.read(f"{self.info.name}_scale")


def _read(raw: SafetensorsSource, name: str, scheme: Float8Scheme, start: int, stop: int) -> Tensor:
    block_rows = scheme.block_size[0]
    first = start // block_rows * block_rows
    scale = raw.read(f"{name}_scale", (first // block_rows, math.ceil(stop / block_rows))).float()
    return scheme.decode(raw.read(name, (first, stop)), scale)[start - first :]


def _find(raw: SafetensorsSource, name: str, scheme: Scheme) -> _Linear:
    assert isinstance(scheme, Float8Scheme), f"{scheme}"
    info, scale = raw.infos()[name], raw.infos()[f"{name}_scale"]
    if len(info.shape) != 2 or scale.shape != scheme.scale_shape(info.shape):
        raise SourceError(
            f"{raw.path_of(name)}: {printable(name)}: weight_scale {list(scale.shape)} does not fit {list(info.shape)} "
            f"in blocks of {list(scheme.block_size)}."
        )
    parts = parts_of(raw, name, ("", "_scale", "_shape", "_zero_point"))
    return _Linear(scheme, TensorInfo(name, info.shape, "F32"), parts)


FLOAT_QUANTIZED = Packing("float-quantized", _stored, _pack, _weights, _INPUTS, _scheme, _find)
