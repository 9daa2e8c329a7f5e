"""ggml's own C code as oracle: quantisation, dequantisation and validation of rows, by ctypes from the wheel of
libggml-python (no compute graph, no threads; `ggml-base` alone).

Types are given by ggml's name ("Q4_K") or by a number of enum ggml_type. Leading dimensions are free everywhere.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

SCRATCH_BYTES = 1 << 20
"""ggml_init wants a context; nothing is put into it, but the call fills ggml's tables."""


NEWER = {"Q2_0": 42}
"""Types that gguf-py has no name for yet."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """libggml-base, initialised."""
    spec = find_spec("libggml")
    assert spec is not None, "the oracle needs libggml-python: pip install -e '.[test]'"
    assert spec.origin is not None
    found = sorted((Path(spec.origin).parent / "lib64").glob("libggml-base.so*"))
    assert found, f"no libggml-base.so beside {spec.origin}"
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_init.argtypes, ggml.ggml_init.restype = [_InitParams], ctypes.c_void_p
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.argtypes, ggml.ggml_quantize_requires_imatrix.restype = (
        [ctypes.c_int],
        ctypes.c_bool,
    )
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    ggml.ggml_get_type_traits.argtypes, ggml.ggml_get_type_traits.restype = (
        [ctypes.c_int],
        ctypes.POINTER(_TypeTraits),
    )
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_init(_InitParams(SCRATCH_BYTES, None, False))
    return ggml


def type_id(kind: str | int) -> int:
    """Number in enum ggml_type."""
    if not isinstance(kind, str):
        return int(kind)
    return NEWER[kind] if kind in NEWER else GGMLQuantizationType[kind].value


def type_sizes(kind: str | int) -> tuple[int, int]:
    """(weights, bytes) of one block, by ggml itself."""
    traits = library().ggml_get_type_traits(type_id(kind)).contents
    return traits.blck_size, traits.type_size


def needs_importance(kind: str | int) -> bool:
    """Whether ggml refuses to quantise to this type without importance."""
    return bool(library().ggml_quantize_requires_imatrix(type_id(kind)))


def quantize(kind: str | int, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """ggml_quantize_chunk. weight (..., out, in) float32, importance (in,) float32 or None -> (..., out, row_bytes)
    uint8. One importance serves all rows: call once for each expert."""
    number, ggml = type_id(kind), library()
    block, nbytes = type_sizes(number)
    in_features = weight.shape[-1]
    assert weight.dtype == torch.float32
    assert in_features % block == 0, f"{in_features} is no multiple of {block}"
    assert importance is not None or not needs_importance(number), f"{kind} needs importance"
    # The names keep the memory alive while C reads it.
    weight = weight.contiguous()
    if importance is not None:
        assert importance.shape == (in_features,)
        importance = importance.float().contiguous()
    blocks = torch.zeros(*weight.shape[:-1], in_features // block * nbytes, dtype=torch.uint8)
    rows = weight.numel() // in_features
    ggml.ggml_quantize_init(number)
    written = ggml.ggml_quantize_chunk(
        number,
        weight.data_ptr(),
        blocks.data_ptr(),
        0,
        rows,
        in_features,
        None if importance is None else importance.data_ptr(),
    )
    assert written == blocks.numel(), f"{kind}: ggml wrote {written} bytes, expected {blocks.numel()}"
    return blocks


def dequantize(kind: str | int, blocks: Tensor) -> Tensor:
    """to_float of the type's traits. blocks (..., out, row_bytes) uint8 -> (..., out, in) float32."""
    number = type_id(kind)
    traits = library().ggml_get_type_traits(number).contents
    assert blocks.dtype == torch.uint8
    assert blocks.shape[-1] % traits.type_size == 0, f"{blocks.shape[-1]} bytes are no whole blocks"
    blocks = blocks.contiguous()
    in_features = blocks.shape[-1] // traits.type_size * traits.blck_size
    weight = torch.empty(*blocks.shape[:-1], in_features, dtype=torch.float32)
    library().ggml_quantize_init(number)
    if weight.numel():
        traits.to_float(blocks.data_ptr(), weight.data_ptr(), weight.numel())
    return weight


def is_valid(kind: str | int, blocks: Tensor) -> bool:
    """ggml_validate_row_data: whether no scale is NaN or infinite (what llama-quantize and `--check-tensors` ask)."""
    blocks = blocks.contiguous()
    return bool(library().ggml_validate_row_data(type_id(kind), blocks.data_ptr(), blocks.numel()))
