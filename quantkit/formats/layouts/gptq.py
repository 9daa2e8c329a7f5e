"""The layout of GPTQ checkpoints, v1 as AutoGPTQ wrote it and v2 (gptqmodel's "gptq_v2").

Which tensors store a linear: `quantkit.formats.layouts.gptq_reader`. Groups lie one after the other, so g_idx is never
permuted and desc_act is false. One section of config.json says bits, groups and symmetry of most linears; "dynamic"
says those of others ("+:pattern") and what is not quantised ("-:pattern"). Patterns are matched from the start of a
module's name, the first that matches decides; vLLM asks for its fused modules, and for a block of experts, by their own
name.

Layout v1 stores zero points less one. Readers disagree about a zero point of 0 there, so such a group is stored the
other way round, with a negative scale and the highest code as zero point: the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.formats.bitpack import WORD_BITS, n_words, pack
from quantkit.formats.folder import FolderLayout
from quantkit.formats.layouts.compressed_tensors_config import LINEAR, find_targets
from quantkit.formats.layouts.gptq_reader import BITS, GPTQ_READER
from quantkit.formats.layouts.refusals import refusal
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import IntScheme, QuantizedTensor, Scheme
from quantkit.tensors import SCALE_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


def _check(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    if not isinstance(scheme, IntScheme):
        raise refusal(name, "gptq", scheme)
    if scheme.bits not in BITS:
        raise refusal(name, "gptq", scheme, "it has 2, 3, 4 and 8 bits")
    for what, length in zip(("outputs", "inputs"), shape, strict=True):
        if length * scheme.bits % WORD_BITS:
            raise SchemeError(
                f"{name}: {length} {what} of {scheme.bits} bits do not fill whole 32-bit words, which gptq needs.",
                hint="Keep this tensor, or take format: compressed-tensors.",
            )


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    scheme, module = tensor.scheme, tensor.module
    assert isinstance(scheme, IntScheme), f"{tensor.name}: `_check` admits no other schemes"
    n_out, n_in = tensor.info.shape
    n_groups = scheme.n_groups(n_in)
    return (
        TensorInfo(f"{module}.qweight", (n_words(n_in, scheme.bits), n_out), "I32"),
        TensorInfo(f"{module}.qzeros", (n_groups, n_words(n_out, scheme.bits)), "I32"),
        TensorInfo(f"{module}.scales", (n_groups, n_out), SCALE_DTYPES[scheme.scale_dtype]),
        TensorInfo(f"{module}.g_idx", (n_in,), "I32"),
    )


def _pack(tensor: QuantizedTensor, *, less: int) -> Mapping[str, Tensor]:
    """``less``: what is subtracted from zero points."""
    import torch

    scheme, module = tensor.scheme, tensor.name.removesuffix(".weight")
    assert isinstance(scheme, IntScheme), f"{tensor.name}: `_check` admits no other schemes"
    codes, scale = tensor.stored["codes"], tensor.stored["scale"]
    if scheme.symmetric:
        zero = torch.full_like(scale, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    else:
        zero = tensor.stored["zero_point"]
        if less:
            codes, scale, zero = _turned(codes, scale, zero, 2**scheme.bits - 1)
    n_in, n_groups = codes.shape[1], scale.shape[1]
    return {
        f"{module}.qweight": pack(codes, scheme.bits).T,
        f"{module}.qzeros": pack((zero - less).T.contiguous(), scheme.bits),
        f"{module}.scales": scale.T,
        f"{module}.g_idx": torch.arange(n_in, dtype=torch.int32, device=codes.device) // (n_in // n_groups),
    }


def _turned(codes: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of zero point 0 the other way round: scale * code = -scale * ((top - code) - top)."""
    import torch

    turned = zero == 0
    of_codes = turned.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    return (
        torch.where(of_codes, top - codes, codes),
        torch.where(turned, -scale, scale),
        torch.where(turned, top, zero).byte(),
    )


def _config(planned: Sequence[PlannedTensor], *, version: str) -> dict[str, object]:
    targets = find_targets(planned, whole_modules=True)
    if not targets.groups:
        return {}
    base = next((group for group in targets.groups if LINEAR in group.targets), targets.groups[0])
    dynamic = {f"-:{_regex(target)}": {} for target in targets.ignore}
    for group in targets.groups:
        if group is not base:
            dynamic |= {f"+:{_regex(target)}": _section(group.scheme) for target in group.targets}
    return {
        "quant_method": "gptq",
        **_section(base.scheme),
        "desc_act": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def _section(scheme: Scheme) -> dict[str, object]:
    assert isinstance(scheme, IntScheme), "`_check` admits no other schemes"
    group_size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": group_size, "sym": scheme.symmetric}


def _regex(target: str) -> str:
    """A pattern as it is, the name of one module as a pattern for it alone."""
    return target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"


GPTQ = FolderLayout(GPTQ_READER, _check, _stored, pack=partial(_pack, less=1), config=partial(_config, version="gptq"))
GPTQ_V2 = FolderLayout(
    GPTQ_READER, _check, _stored, pack=partial(_pack, less=0), config=partial(_config, version="gptq_v2")
)
