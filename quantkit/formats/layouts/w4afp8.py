"""compressed-tensors' preset W4AFP8 in its format ``pack-quantized``: int4 weights, inputs rounded to FP8 when served.

The tensors are those of int4 in groups of 128, see `pack_quantized`; that inputs are rounded, for each token anew, is
said in ``input_activations`` alone. compressed-tensors up to 0.20 takes ``int-quantized`` for this preset if nobody
names a format: a byte for each code, which vLLM's kernels for it do not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit.formats.folder import Rows
from quantkit.formats.layouts.pack_quantized import PACK_QUANTIZED
from quantkit.formats.layouts.packing import Packing, StoredLinear
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import QuantizedTensor, Scheme, W4AFp8Scheme
from quantkit.schemes.w4afp8 import INT4
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored

_INPUTS: dict[str, object] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "token",
    "group_size": None,
    "dynamic": True,
    "actorder": None,
}


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    return PACK_QUANTIZED.stored(replace(tensor, scheme=INT4))


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    return PACK_QUANTIZED.pack(replace(tensor, scheme=INT4))


def _weights(scheme: Scheme) -> dict[str, object]:
    return PACK_QUANTIZED.weights(INT4)


def _scheme(where: str, weights: Mapping[str, object], inputs: Mapping[str, object]) -> Scheme | None:
    """Other integers and other inputs are left to `pack_quantized`, which reads the weights alone."""
    said = all(inputs.get(key) == _INPUTS[key] for key in ("num_bits", "type", "strategy", "dynamic"))
    return W4AFp8Scheme() if said and PACK_QUANTIZED.scheme(where, weights, {}) == INT4 else None


@dataclass(frozen=True, slots=True)
class _Linear:
    """A `StoredLinear`."""

    weights: StoredLinear
    scheme: W4AFp8Scheme

    @property
    def info(self) -> TensorInfo:
        """See `PackedLinear`."""
        return self.weights.info

    @property
    def parts(self) -> tuple[str, ...]:
        """See `PackedLinear`."""
        return self.weights.parts

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`."""
        return self.weights.decode(raw, rows)

    def read_stored(self, raw: SafetensorsSource) -> Stored:
        """See `StoredLinear`."""
        return self.weights.read_stored(raw)

    def read_scale(self, raw: SafetensorsSource) -> Tensor:
        """See `StoredLinear`."""
        return self.weights.read_scale(raw)


def _find(raw: SafetensorsSource, name: str, scheme: Scheme) -> _Linear:
    assert isinstance(scheme, W4AFp8Scheme), f"{scheme}"
    return _Linear(PACK_QUANTIZED.find(raw, name, INT4), scheme)


W4AFP8 = Packing("pack-quantized", _stored, _pack, _weights, _INPUTS, _scheme, _find)
