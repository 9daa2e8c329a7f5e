"""FP4 and FP8 as two releases store them that no family here computes: which tensors belong together, and what they
mean. Their weights are counted, nothing is decoded.

    gpt-oss       X_blocks     uint8 (experts, out, groups, 16)  two codes to a byte, the first in the low nibble
                  X_scales     uint8 (experts, out, groups)      exponents, 2**(n - 127)
    DeepSeek V4   X.weight     int8 (out, in / 2)                the same codes (experts)
                  X.scale      F8_E8M0 (out, in / 32)
                  X.weight     F8_E4M3 (out, in)                 other linears
                  X.scale      F8_E8M0 or F32, one for a block of 128 x 128

Sources: transformers 5.23 (integrations/mxfp4.py), llama.cpp (conversion/deepseek.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.schemes import Float8Scheme, Mxfp4Scheme
from quantkit.tensors import TensorInfo

BLOCKS, SCALES, SCALE = "_blocks", "_scales", ".scale"
_GROUP, _BYTES = 32, ("U8", "I8")


def part_of(name: str, infos: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The weight that a tensor stores with another one, and its suffix there; None if there is no other one."""
    for suffix, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        owner = name.removesuffix(suffix)
        if owner != name and f"{owner}{other}" in infos:
            return owner, suffix
    weight = infos.get(f"{name.removesuffix(SCALE)}.weight")
    stored = weight is not None and name.endswith(SCALE) and weight.dtype in ("F8_E4M3", *_BYTES)
    return (weight.name, SCALE) if weight is not None and stored else None


def understood(parts: Mapping[str, TensorInfo]) -> tuple[tuple[int, ...], Mxfp4Scheme | Float8Scheme] | None:
    """Shape and scheme of a weight by the tensors that store it ("" is ``X.weight``), None for other storage."""
    match parts:
        case {"_blocks": TensorInfo(shape=(*lead, groups, 16), dtype="U8"), "_scales": scales} if len(parts) == 2:
            return ((*lead, groups * _GROUP), Mxfp4Scheme()) if scales.shape == (*lead, groups) else None
        case {"": TensorInfo(shape=(n_out, n_in), dtype="F8_E4M3"), ".scale": scale} if len(parts) == 2:
            fits = scale.shape == Float8Scheme().scale_shape((n_out, n_in))
            return ((n_out, n_in), Float8Scheme()) if fits else None
        case {"": TensorInfo(shape=(n_out, n_bytes), dtype=dtype), ".scale": scale} if len(parts) == 2:
            fits = dtype in _BYTES and scale.shape == (n_out, 2 * n_bytes // _GROUP) and not 2 * n_bytes % _GROUP
            return ((n_out, 2 * n_bytes), Mxfp4Scheme()) if fits else None
        case _:
            return None
