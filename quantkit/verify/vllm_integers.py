"""What vLLM demands of the sections that GPTQ and AWQ write into config.json (its auto_gptq and auto_awq, 0.24 and
0.33)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import cast

from quantkit.errors import SourceError
from quantkit.runtimes.vllm.contract import MARLIN_BITS
from quantkit.verify.checkpoint import Checkpoint
from quantkit.verify.stated import AWQ, GPTQ

_SAMPLED = 64
"""g_idx tensors that are read: act-order permutes all or none."""


def faults(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each."""
    for check in _FAULTS.get(checkpoint.layout, ()):
        yield from check(checkpoint)


def _gptq_kernels(checkpoint: Checkpoint) -> Iterator[str]:
    section = checkpoint.section
    if section.get("sym") is False:
        yield "quantization_config.sym is false: vLLM takes symmetric GPTQ only. gptqmodel and transformers take it."
    if section.get("bits") not in MARLIN_BITS:
        yield f"quantization_config.bits is {section.get('bits')}: vLLM takes GPTQ of 4 and 8 bits."


def _act_order(checkpoint: Checkpoint) -> Iterator[str]:
    """vLLM drops g_idx. With desc_act it refuses, without it computes with the wrong groups."""
    if checkpoint.section.get("desc_act") and checkpoint.section.get("group_size") != -1:
        yield "quantization_config.desc_act is true: vLLM takes act-order no longer, but for one group a row."
        return
    names = (name for name in checkpoint.raw.infos() if name.endswith(".g_idx"))
    permuted = [name for name in islice(names, _SAMPLED) if not _is_sorted(checkpoint, name)]
    if permuted:
        yield f"{permuted[0]}: permuted, though desc_act is false: vLLM drops it and computes with the wrong groups."


def _is_sorted(checkpoint: Checkpoint, name: str) -> bool:
    try:
        group = checkpoint.raw.read(name)
    except SourceError:
        return True  # the file is damaged, which the checksums tell
    return bool((group[1:] >= group[:-1]).all())


def _left_out(checkpoint: Checkpoint) -> Iterator[str]:
    """modules_to_not_convert is a list of parts of names: "mlp.gate" takes gate_proj too."""
    found = checkpoint.section.get("modules_to_not_convert")
    patterns = (
        [part for part in cast("list[object]", found) if isinstance(part, str)] if isinstance(found, list) else []
    )
    for pattern in patterns:
        hit = next((t.module for t in checkpoint.planned if t.scheme is not None and pattern in t.module), None)
        if hit is not None:
            yield f"modules_to_not_convert: {pattern[:60]!r} is a part of {hit}, which is quantised."


def _awq_kernels(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.section.get("zero_point") is False:
        stored = any(name.endswith(".qzeros") for name in checkpoint.raw.infos())
        repair = " They are stored: write true." if stored else ""
        yield f"quantization_config.zero_point is false: vLLM's kernels take AWQ with zero points only.{repair}"
    if checkpoint.section.get("bits", checkpoint.section.get("w_bit")) != 4:
        yield "quantization_config.bits: vLLM takes AWQ of 4 bits."


_FAULTS: Mapping[str, tuple[Callable[[Checkpoint], Iterator[str]], ...]] = {
    GPTQ: (_gptq_kernels, _act_order),
    AWQ: (_awq_kernels, _left_out),
}
