"""The layout of AWQ checkpoints, version "gemm".

Which tensors store a linear: `quantkit.formats.layouts.awq_reader`. Zero points are always stored; those of a symmetric
grid are 8. config.json has room for one group size. ``modules_to_not_convert`` lists what is not quantised: vLLM and
transformers take a module for listed if an entry is part of its name, so entries are whole names of modules, or of a
whole block of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.formats.bitpack import pack
from quantkit.formats.folder import FolderLayout
from quantkit.formats.layouts.awq_reader import AWQ_READER, BITS, ORDER, PER_WORD
from quantkit.formats.layouts.kept_modules import kept_modules, wrongly_kept
from quantkit.formats.layouts.refusals import refusal
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import IntScheme, QuantizedTensor, Scheme
from quantkit.tensors import SCALE_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


def _check(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    if not isinstance(scheme, IntScheme):
        raise refusal(name, "awq", scheme)
    if scheme.bits != BITS:
        raise refusal(name, "awq", scheme, f"it has {BITS} bits")
    if shape[0] % PER_WORD:
        raise SchemeError(
            f"{name}: {shape[0]} outputs are not a multiple of {PER_WORD}, which awq needs.",
            hint="Keep this tensor, or take format: compressed-tensors.",
        )


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    scheme, module = tensor.scheme, tensor.module
    assert isinstance(scheme, IntScheme), f"{tensor.name}: `_check` admits no other schemes"
    n_out, n_in = tensor.info.shape
    n_groups = scheme.n_groups(n_in)
    return (
        TensorInfo(f"{module}.qweight", (n_in, n_out // PER_WORD), "I32"),
        TensorInfo(f"{module}.qzeros", (n_groups, n_out // PER_WORD), "I32"),
        TensorInfo(f"{module}.scales", (n_groups, n_out), SCALE_DTYPES[scheme.scale_dtype]),
    )


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    import torch

    module, scale = tensor.name.removesuffix(".weight"), tensor.stored["scale"]
    zero = tensor.stored.get("zero_point")
    if zero is None:
        zero = torch.full_like(scale, 2 ** (BITS - 1), dtype=torch.uint8)
    return {
        f"{module}.qweight": _words(tensor.stored["codes"]),
        f"{module}.qzeros": _words(zero),
        f"{module}.scales": scale.T,
    }


def _words(codes: Tensor) -> Tensor:
    """codes (out, n) uint8 -> (n, out / 8) int32, eight outputs to a word, interleaved."""
    return pack(codes.T.unflatten(1, (-1, PER_WORD))[:, :, list(ORDER)].flatten(1), BITS)


def _config(planned: Sequence[PlannedTensor]) -> dict[str, object]:
    sizes = _group_sizes(planned)
    if not sizes:
        return {}
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": sizes[0],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept_modules(planned),
    }


def _group_sizes(planned: Sequence[PlannedTensor]) -> list[int]:
    """Distinct group sizes, -1 for whole rows, in order of first appearance."""
    found = (t.scheme.group_size or -1 for t in planned if isinstance(t.scheme, IntScheme))
    return list(dict.fromkeys(found))


def _problems(planned: Sequence[PlannedTensor]) -> list[str]:
    sizes = _group_sizes(planned)
    found: list[str] = []
    if len(sizes) > 1:
        listed = " and ".join(map(str, sizes))
        found.append(
            f"group sizes {listed} are planned, awq holds one for all linears; format: gptq and compressed-tensors "
            "hold several."
        )
    return found + wrongly_kept(planned, "awq")


AWQ = FolderLayout(AWQ_READER, _check, _stored, _pack, _config, _problems)
