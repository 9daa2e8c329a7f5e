"""The layout of bitsandbytes checkpoints of 4 bits.

Which tensors store a linear: `quantkit.formats.layouts.bitsandbytes_reader`. The state's JSON depends on the shape
alone: what double quantisation adds to scales is 0 here, and its levels are stored with each linear.

Routed experts are refused: transformers holds them fused, and its bitsandbytes quantiser takes single linears only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.formats.folder import FolderLayout
from quantkit.formats.layouts.bitsandbytes_reader import BITSANDBYTES_READER
from quantkit.formats.layouts.kept_modules import kept_modules, wrongly_kept
from quantkit.formats.layouts.refusals import refusal
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import Bnb4Scheme, QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

NESTED_BLOCK = 256
"""Scales that share a nested scale, bitsandbytes' own number."""


def _check(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    if not isinstance(scheme, Bnb4Scheme):
        raise refusal(name, "bitsandbytes", scheme)


def _state(shape: tuple[int, ...], scheme: Bnb4Scheme) -> bytes:
    """What is known of a linear beside its tensors. "dtype": in which a runtime decodes it."""
    state: dict[str, object] = {
        "quant_type": scheme.type,
        "blocksize": scheme.block_size,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    if scheme.double_quant:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
    return json.dumps(state).encode()


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    scheme, name, shape = tensor.scheme, tensor.name, tensor.info.shape
    assert isinstance(scheme, Bnb4Scheme), f"{name}: `_check` admits no other schemes"
    n_blocks = math.prod(shape) // scheme.block_size
    infos = [
        TensorInfo(name, (math.prod(shape) // 2, 1), "U8"),
        TensorInfo(f"{name}.absmax", (n_blocks,), "U8" if scheme.double_quant else "F32"),
        TensorInfo(f"{name}.quant_map", (16,), "F32"),
    ]
    if scheme.double_quant:
        infos += [
            TensorInfo(f"{name}.nested_absmax", (math.ceil(n_blocks / NESTED_BLOCK),), "F32"),
            TensorInfo(f"{name}.nested_quant_map", (256,), "F32"),
        ]
    state = TensorInfo(f"{name}.quant_state.bitsandbytes__{scheme.type}", (len(_state(shape, scheme)),), "U8")
    return (*infos, state)


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    import torch

    scheme, name, stored = tensor.scheme, tensor.name, tensor.stored
    assert isinstance(scheme, Bnb4Scheme), f"{name}: `_check` admits no other schemes"
    codes, scale = stored["codes"], stored["scale"].flatten()
    state = torch.frombuffer(bytearray(_state(tuple(codes.shape), scheme)), dtype=torch.uint8)
    parts = {
        name: (codes[:, ::2] << 4 | codes[:, 1::2]).view(-1, 1),
        f"{name}.absmax": scale,
        f"{name}.quant_map": scheme.levels(codes.device),
        f"{name}.quant_state.bitsandbytes__{scheme.type}": state,
    }
    if scheme.double_quant:
        nested = stored["nested_absmax"]
        assert bool((nested == nested[0]).all()), f"{name}: rows with nested scales of their own"
        parts[f"{name}.nested_absmax"] = nested[0].repeat(math.ceil(len(scale) / NESTED_BLOCK))
        parts[f"{name}.nested_quant_map"] = scheme.nested_levels(codes.device)
    return parts


def _config(planned: Sequence[PlannedTensor]) -> dict[str, object]:
    scheme = next((tensor.scheme for tensor in planned if isinstance(tensor.scheme, Bnb4Scheme)), None)
    if scheme is None:
        return {}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.type,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept_modules(planned),
    }


def _problems(planned: Sequence[PlannedTensor]) -> list[str]:
    quantised = [tensor for tensor in planned if tensor.scheme is not None]
    found = wrongly_kept(planned, "bitsandbytes")
    labels = list(dict.fromkeys(tensor.scheme.label for tensor in quantised if tensor.scheme is not None))
    if len(labels) > 1:
        found.append(f"{' and '.join(labels)} are planned, bitsandbytes holds one scheme for all linears.")
    experts = [tensor for tensor in quantised if tensor.expert is not None]
    if experts:
        found.append(
            f"{experts[0].module} and {len(experts) - 1:,} more routed experts: nothing loads experts of bitsandbytes, "
            "which runtimes hold fused; keep them, or take format: compressed-tensors or gguf."
        )
    return found


BITSANDBYTES = FolderLayout(BITSANDBYTES_READER, _check, _stored, _pack, _config, _problems)
