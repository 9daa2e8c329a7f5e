"""compressed-tensors' ``pack-quantized``: integers of 2 to 8 bits.

    P.weight_packed      int32 (out, ceil(in * bits / 32))     codes, `bitpack`
    P.weight_scale       bf16/f16/f32 (out, groups)            the scale that is served
    P.weight_zero_point  int32 (ceil(out * bits / 32), groups) only if asymmetric; packed along out
    P.weight_shape       int64 (2,)                            out, in

compressed-tensors counts codes from -2**(bits-1), quantkit from 0; both offsets cancel in (code - zero_point), and the
packed bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.bitpack import WORD_BITS, n_words, pack, unpack
from quantkit.formats.folder import Rows, by_runs
from quantkit.formats.layouts.packing import Packing, parts_of, require
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import IntScheme, QuantizedTensor, Scheme
from quantkit.tensors import SCALE_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored

_PARTS = ("_packed", "_scale", "_shape", "_zero_point")


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    scheme, prefix = tensor.scheme, f"{tensor.module}.weight"
    assert isinstance(scheme, IntScheme), f"{tensor.name}: {scheme}"
    out_features, in_features = tensor.info.shape
    n_groups = scheme.n_groups(in_features)
    infos = [
        TensorInfo(f"{prefix}_packed", (out_features, n_words(in_features, scheme.bits)), "I32"),
        TensorInfo(f"{prefix}_scale", (out_features, n_groups), SCALE_DTYPES[scheme.scale_dtype]),
        TensorInfo(f"{prefix}_shape", (2,), "I64"),
    ]
    if not scheme.symmetric:
        infos.append(TensorInfo(f"{prefix}_zero_point", (n_words(out_features, scheme.bits), n_groups), "I32"))
    return tuple(infos)


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    import torch

    scheme, stored, name = tensor.scheme, tensor.stored, tensor.name
    assert isinstance(scheme, IntScheme), f"{name}: {scheme}"
    parts = {
        f"{name}_packed": pack(stored["codes"], scheme.bits),
        f"{name}_scale": stored["scale"],
        f"{name}_shape": torch.tensor(stored["codes"].shape),
    }
    if not scheme.symmetric:
        parts[f"{name}_zero_point"] = pack(stored["zero_point"].T.contiguous(), scheme.bits).T
    return parts


def _weights(scheme: Scheme) -> dict[str, object]:
    assert isinstance(scheme, IntScheme), f"{scheme}"
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        # vLLM 0.24 compares this number also for channels, where null raises TypeError.
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


def _scheme(where: str, weights: Mapping[str, object], inputs: Mapping[str, object]) -> Scheme | None:
    """The dtype of the scales is not said here; each tensor's header says it."""
    bits, kind, strategy, group_size = (weights.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    symmetric = weights.get("symmetric") is not False
    match kind, bits, strategy, group_size:
        case "int", int(), "group", int() if 2 <= bits <= 8 and group_size >= 8:
            return IntScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="bfloat16")
        case "int", int(), "channel", _ if 2 <= bits <= 8:
            return IntScheme(bits=bits, group_size=None, symmetric=symmetric, scale_dtype="bfloat16")
        case _:
            return None


@dataclass(frozen=True, slots=True)
class _Linear:
    """A `StoredLinear`."""

    scheme: IntScheme
    info: TensorInfo
    parts: tuple[str, ...]

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`. Only these rows are read, and those that share a word with them."""
        return by_runs(rows, self.info.shape[1], partial(self._run, raw))

    def read_stored(self, raw: SafetensorsSource) -> Stored:
        """See `StoredLinear`."""
        return self._rows(raw, 0, self.info.shape[0])

    def read_scale(self, raw: SafetensorsSource) -> Tensor:
        """See `StoredLinear`."""
        return raw.read(f"{self.info.name}_scale")

    def _run(self, raw: SafetensorsSource, start: int, stop: int) -> Tensor:
        return self.scheme.decode(**self._rows(raw, start, stop))

    def _rows(self, raw: SafetensorsSource, start: int, stop: int) -> Stored:
        name, scheme = self.info.name, self.scheme
        codes = unpack(raw.read(f"{name}_packed", (start, stop)), scheme.bits, self.info.shape[1])
        stored = {"codes": codes, "scale": raw.read(f"{name}_scale", (start, stop))}
        if not scheme.symmetric:
            stored["zero_point"] = _read_zero_point(raw, self.info, scheme, start, stop)
        return stored


def _read_zero_point(raw: SafetensorsSource, info: TensorInfo, scheme: IntScheme, start: int, stop: int) -> Tensor:
    """Zero points are packed along rows: 32 rows are exactly ``bits`` words, so reading starts at a multiple of 32
    rows."""
    first = start // WORD_BITS * WORD_BITS
    last = min(math.ceil(stop / WORD_BITS) * WORD_BITS, info.shape[0])
    first_word = first // WORD_BITS * scheme.bits
    words = raw.read(f"{info.name}_zero_point", (first_word, first_word + n_words(last - first, scheme.bits)))
    return unpack(words.T.contiguous(), scheme.bits, last - first).T[start - first : stop - first].contiguous()


def _find(raw: SafetensorsSource, name: str, scheme: Scheme) -> _Linear:
    assert isinstance(scheme, IntScheme), f"{scheme}"
    packed, scale = raw.infos()[f"{name}_packed"], raw.infos()[f"{name}_scale"]
    where = f"{raw.path_of(packed.name)}: {printable(name)}"
    dtype = next((ours for ours, theirs in SCALE_DTYPES.items() if theirs == scale.dtype), None)
    if dtype is None or len(scale.shape) != 2 or len(packed.shape) != 2:
        raise SourceError(f"{where}: weight_scale is {scale.dtype} {list(scale.shape)}, a matrix of floats was needed.")
    scheme = scheme.model_copy(update={"scale_dtype": dtype})
    shape = (packed.shape[0], _in_features(raw, name, scheme))
    needed = {
        f"{name}_packed": ("I32", (shape[0], n_words(shape[1], scheme.bits))),
        f"{name}_scale": (scale.dtype, (shape[0], scheme.n_groups(shape[1]))),
    }
    if not scheme.symmetric:
        needed[f"{name}_zero_point"] = "I32", (n_words(shape[0], scheme.bits), scheme.n_groups(shape[1]))
    require(raw, name, needed)
    return _Linear(scheme, TensorInfo(name, shape, "F32"), parts_of(raw, name, _PARTS))


def _in_features(raw: SafetensorsSource, name: str, scheme: IntScheme) -> int:
    """Inputs of a linear, from the number of its groups; rows of one scale need weight_shape (two numbers), since
    padding hides the true width."""
    stored = raw.infos()
    if scheme.group_size is not None:
        return stored[f"{name}_scale"].shape[1] * scheme.group_size
    shape = stored.get(f"{name}_shape")
    if shape is not None and shape.shape == (2,) and shape.dtype in ("I64", "I32"):
        return int(raw.read(shape.name)[1])
    return stored[f"{name}_packed"].shape[1] * WORD_BITS // scheme.bits


PACK_QUANTIZED = Packing("pack-quantized", _stored, _pack, _weights, None, _scheme, _find)
