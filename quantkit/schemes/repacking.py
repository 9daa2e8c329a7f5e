"""Codes and scales of one scheme as another stores them: the same numbers, so that both decode to the same bits.

    symmetric int4, int5, int8   Q4_0, Q5_0, Q8_0   codes count from the lowest level in both; scales as float16
    symmetric integers           the same with smaller groups, or with scales of another dtype
    MXFP4                        ggml's MXFP4       ggml counts levels in halves, the exponent byte is the same

Blocks of a GGUF file go the same ways back: they are shown as the left column.

Groups of a multiple of the new size (or whole rows) repeat their scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.schemes import GgmlScheme, IntScheme, Mxfp4Scheme, Scheme
from quantkit.schemes.ggml.types import BLOCK_TYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored

_BLOCKS: Mapping[int, str] = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""Bits of symmetric integers -> the type with the same levels."""
_GROUP = 32
"""Weights in a block of these types, and of MXFP4."""
_CODES_AND_SCALES: Mapping[str, IntScheme | Mxfp4Scheme] = {
    "Q4_0": IntScheme(bits=4, group_size=_GROUP, symmetric=True, scale_dtype="float16"),
    "Q5_0": IntScheme(bits=5, group_size=_GROUP, symmetric=True, scale_dtype="float16"),
    "Q8_0": IntScheme(bits=8, group_size=_GROUP, symmetric=True, scale_dtype="float16"),
    "MXFP4": Mxfp4Scheme(),
}
"""Block type -> the scheme whose codes and scales its blocks hold."""
_NAN = 255
"""The exponent byte that stands for no number."""


def block_type(scheme: Scheme) -> str | None:
    """The block type of ggml that holds the same numbers, None if there is none."""
    match scheme:
        case IntScheme(symmetric=True, group_size=size) if size is None or size % _GROUP == 0:
            return _BLOCKS.get(scheme.bits)
        case Mxfp4Scheme():
            return "MXFP4"
        case GgmlScheme():
            return scheme.type
        case _:
            return None


def unpacked_scheme(kind: str) -> Scheme:
    """What a matrix in blocks of this type can be shown as: codes and scales of their own where that says the same, as
    Q4_0 is int4 in groups of 32 with float16 scales, else the type itself."""
    return _CODES_AND_SCALES.get(kind) or GgmlScheme.model_validate({"type": kind})


def unpacked(kind: str, blocks: Tensor) -> Stored:
    """Blocks (out, row bytes) uint8 as `unpacked_scheme` stores them. Raises `SchemeError` for an exponent of MXFP4
    that stands for no number in other files (255, of which llama.cpp makes 2**127)."""
    from quantkit.schemes.ggml.layout import unpack

    if kind not in _CODES_AND_SCALES:
        return {"blocks": blocks}
    scale = unpacked_scale(kind, blocks)
    check_scale(_CODES_AND_SCALES[kind], GgmlScheme.model_validate({"type": kind}), scale)
    return {"codes": unpack(BLOCK_TYPES[kind], blocks)[0], "scale": scale}


def unpacked_scale(kind: str, blocks: Tensor) -> Tensor:
    """The scales alone of a type that has codes and scales of its own: (out, groups) float16, MXFP4: uint8."""
    import torch

    first = blocks.view(len(blocks), -1, BLOCK_TYPES[kind].nbytes)
    if kind == "MXFP4":
        return first[..., 0].contiguous()
    return first[..., :2].contiguous().view(torch.float16).squeeze(-1)


def repacks(source: Scheme, target: Scheme) -> bool:
    """Whether every matrix in ``source`` can be stored in ``target`` without rounding, but for scales that do not fit
    its dtype: `check_scale`."""
    if source == target:
        return True
    if isinstance(target, GgmlScheme):
        return block_type(source) == target.type
    if not isinstance(source, IntScheme) or not isinstance(target, IntScheme):
        return False
    alike = source.bits == target.bits and source.symmetric and target.symmetric
    return alike and _divides(target.group_size, source.group_size)


def check_scale(source: Scheme, target: Scheme, scale: Tensor) -> None:
    """Raise `SchemeError` unless each scale of ``source`` (out, groups) is one of ``target``. For pairs that `repacks`
    admits."""

    if source == target:
        return
    if isinstance(source, Mxfp4Scheme):
        bad, needed = scale == _NAN, "the exponent of a number"
    else:
        dtype = _scale_dtype(target)
        bad, needed = scale.to(dtype).float() != scale.float(), f"a number in {str(dtype).removeprefix('torch.')}"
    if bad.any():
        found = scale[bad].float()
        raise SchemeError(
            f"{int(bad.sum()):,} of {scale.numel():,} scales are not {needed} exactly, such as {float(found[0]):.6g}."
        )


def repacked(source: Scheme, target: Scheme, stored: Stored) -> Stored:
    """What ``target`` stores for a matrix (out, in) that ``source`` stores so: the same numbers. For pairs that
    `repacks` admits; raises `SchemeError` as `check_scale` does."""
    if source == target:
        return stored
    codes, scale = stored["codes"], stored["scale"]
    check_scale(source, target, scale)
    if isinstance(target, GgmlScheme):
        return {"blocks": _blocks(target, codes, scale)}
    assert isinstance(target, IntScheme), f"{source} as {target}"
    return {"codes": codes, "scale": _spread(scale.to(_scale_dtype(target)), target.n_groups(codes.shape[-1]))}


def _blocks(target: GgmlScheme, codes: Tensor, scale: Tensor) -> Tensor:
    import torch

    from quantkit.schemes.ggml.layout import pack
    from quantkit.schemes.ggml.types import BlockParams

    kind = BLOCK_TYPES[target.type]
    if scale.dtype == torch.uint8:  # 2**(n - 127) for levels in ones is 2**(n - 128) for ggml's, in halves
        exponent = scale.int() - 128
        d = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    else:
        d = _spread(scale.float(), codes.shape[-1] // kind.block)
    return pack(kind, codes, BlockParams(d))


def _spread(scale: Tensor, n_groups: int) -> Tensor:
    """Scales (out, groups) of larger groups -> (out, n_groups)."""
    return scale.repeat_interleave(n_groups // scale.shape[-1], -1)


def _scale_dtype(target: Scheme) -> torch.dtype:
    import torch

    return getattr(torch, target.scale_dtype) if isinstance(target, IntScheme) else torch.float16


def _divides(group_size: int | None, larger: int | None) -> bool:
    """Whether groups of one size make up those of another; None is a whole row, which any size of a grid divides."""
    if larger is None or group_size is None:
        return larger is None
    return larger % group_size == 0
