"""What the runtimes demand of a compressed-tensors checkpoint, checked on the plan, before any work.

`problems`: no runtime would load it, or would load it wrongly without a word. `notes`: loads, but not everywhere.
Each line names the module, what is planned and what is needed. Observed in vLLM 0.24 and 0.33 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quantkit.formats.bitpack import WORD_BITS
from quantkit.formats.layouts.compressed_tensors_config import FUSED_PARTS, KEPT, is_module, numbered_schemes
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import Float8Scheme, IntScheme, Scheme, describe

MARLIN_GROUP_SIZES = (None, 32, 64, 128)
MARLIN_BITS = (4, 8)
WIDE_TENSOR_PARALLEL = 8
_PLAIN_IN_VLLM = ("mlp.gate", "eh_proj", "embed_tokens", "lm_head", "shared_head.head")
"""Modules that vLLM builds without a quantisation config: they need a plain ``weight``."""

Linears = dict[str, tuple[PlannedTensor, int]]
"""Module -> the planned tensor and a number that stands for its scheme."""


def problems(planned: Sequence[PlannedTensor]) -> list[str]:
    """One line for each fault that makes the checkpoint unloadable or wrong; [] if there is none."""
    _, keys = numbered_schemes(tensor.scheme for tensor in planned)
    experts, others = Linears(), Linears()
    for tensor, key in zip(planned, keys, strict=True):
        if key != KEPT or is_module(tensor):
            (experts if ".experts." in tensor.name else others)[tensor.module] = tensor, key
    return [
        *_plain_modules(others),
        *_split_fused(others),
        *_mixed_experts(experts),
        *_packed_zero_points({**others, **experts}),
    ]


def notes(planned: Sequence[PlannedTensor]) -> list[str]:
    """One line for each runtime that will not take this checkpoint, or takes it only in part."""
    schemes, keys = numbered_schemes(tensor.scheme for tensor in planned)
    by_scheme: dict[int, list[PlannedTensor]] = {}
    for tensor, key in zip(planned, keys, strict=True):
        if is_module(tensor):
            by_scheme.setdefault(key, []).append(tensor)
    kept = by_scheme.pop(KEPT, [])
    uses = [Use(schemes[key], tensors, list(filter(_is_expert, tensors))) for key, tensors in by_scheme.items()]
    return [line for check in _NOTES for line in check(uses, kept)]


# --- problems ---------------------------------------------------------------------------------------------------------


def _plain_modules(linears: Linears) -> Iterator[str]:
    for module, (tensor, key) in linears.items():
        if key != KEPT and any(module == plain or module.endswith(f".{plain}") for plain in _PLAIN_IN_VLLM):
            yield f"{module}: planned as {describe(tensor.scheme)}, but vLLM reads it only unquantised; keep it."


def _split_fused(linears: Linears) -> Iterator[str]:
    """gate and up, q_a and kv_a are one matrix in vLLM. The experts' are reported with their layer."""
    for fused, parts in FUSED_PARTS.items():
        for module in linears:
            parent, _, leaf = module.rpartition(".")
            if leaf != parts[0]:
                continue
            members = {part: linears[f"{parent}.{part}"] for part in parts if f"{parent}.{part}" in linears}
            if len({key for _, key in members.values()}) > 1:
                found = ", ".join(f"{part} {describe(tensor.scheme)}" for part, (tensor, _) in members.items())
                yield f"{parent}: {found}; vLLM joins them into {fused}, so they need one scheme or must all be kept."


def _mixed_experts(experts: Linears) -> Iterator[str]:
    """All experts of a layer are two tensors in vLLM; it looks only at expert 0 and would read the others wrongly."""
    first_of: dict[str, dict[int, PlannedTensor]] = {}
    for module, (tensor, key) in experts.items():
        first_of.setdefault(module.partition(".experts.")[0], {}).setdefault(key, tensor)
    for parent, first in first_of.items():
        if len(first) > 1:
            listed = ", ".join(f"{t.module.removeprefix(parent + '.')} {describe(t.scheme)}" for t in first.values())
            yield f"{parent}: {listed}; all projections of all experts of a layer need one scheme."


def _packed_zero_points(linears: Linears) -> Iterator[str]:
    for module, (tensor, _) in linears.items():
        scheme = tensor.scheme
        if isinstance(scheme, IntScheme) and not scheme.symmetric and tensor.info.shape[0] * scheme.bits % WORD_BITS:
            yield (
                f"{module}: {tensor.info.shape[0]} zero points of {scheme.bits} bits do not fill whole 32-bit words, "
                "which vLLM needs; take symmetric: true or keep it."
            )


# --- notes ------------------------------------------------------------------------------------------------------------

Tensors = list[PlannedTensor]


@dataclass(frozen=True, slots=True)
class Use:
    """A scheme and the linears that have it; ``experts`` are those of them that are routed experts."""

    scheme: Scheme
    tensors: Tensors
    experts: Tensors


def _note_bits(uses: list[Use], kept: Tensors) -> Iterator[str]:
    text = (
        "vLLM's Marlin kernels take 4 and 8 bits; other widths load in transformers, in vLLM at best by other kernels."
    )
    for use in uses:
        if isinstance(use.scheme, IntScheme) and use.scheme.bits not in MARLIN_BITS:
            yield _line(use.tensors, text)


def _note_group_size(uses: list[Use], kept: Tensors) -> Iterator[str]:
    for use in uses:
        if isinstance(use.scheme, IntScheme) and use.scheme.group_size not in MARLIN_GROUP_SIZES:
            yield _line(use.tensors, "vLLM's Marlin kernels take group_size 32, 64, 128 or null (one scale a row).")


def _note_asymmetric(uses: list[Use], kept: Tensors) -> Iterator[str]:
    for use in uses:
        if isinstance(use.scheme, IntScheme) and not use.scheme.symmetric:
            yield _line(use.tensors, "transformers 5.23 cannot load zero points; vLLM can.")


def _note_scale_dtype(uses: list[Use], kept: Tensors) -> Iterator[str]:
    text = "vLLM rounds scales to the model's dtype when it loads, but codes were chosen for float32 scales."
    for use in uses:
        if isinstance(use.scheme, IntScheme) and use.scheme.scale_dtype == "float32":
            yield _line(use.tensors, text)


def _note_int8_experts(uses: list[Use], kept: Tensors) -> Iterator[str]:
    text = "vLLM 0.24 takes 8-bit routed experts only with group_size null (0.33 takes groups too)."
    for use in uses:
        if use.experts and isinstance(use.scheme, IntScheme) and use.scheme.bits == 8 and use.scheme.group_size:
            yield _line(use.experts, text)


def _note_expert_width(uses: list[Use], kept: Tensors) -> Iterator[str]:
    """Tensor parallelism cuts the input of down_proj; a group must not be cut."""
    for use in uses:
        down = next((tensor for tensor in use.experts if tensor.module.endswith(".down_proj")), None)
        if down is None or not isinstance(use.scheme, IntScheme) or use.scheme.group_size is None:
            continue
        in_features = down.info.shape[1]
        ways = use.scheme.n_groups(in_features)
        if ways < WIDE_TENSOR_PARALLEL:
            yield (
                f"{down.module}: {in_features} inputs are {ways} groups of {use.scheme.group_size}, so vLLM can split "
                f"experts over at most {ways} GPUs by tensor parallelism; expert and pipeline parallelism are free."
            )


def _note_float8(uses: list[Use], kept: Tensors) -> Iterator[str]:
    text = "vLLM rounds their inputs to FP8 too (as DeepSeek serves them); GPUs without FP8 compute in 16 bits."
    for use in uses:
        if isinstance(use.scheme, Float8Scheme):
            yield _line(use.tensors, text)
            if use.experts:
                yield _line(use.experts, "transformers 5.23 cannot load FP8 block routed experts; vLLM can.")


def _note_kept_experts(uses: list[Use], kept: Tensors) -> Iterator[str]:
    """Experts of a layer that is kept as a whole (MTP) are no matter: transformers does not load it."""
    layers = {tensor.layer for use in uses for tensor in use.tensors}
    experts = [tensor for tensor in kept if _is_expert(tensor) and tensor.layer in layers]
    if experts:
        yield _line(
            experts, "transformers 5.23 loses unquantised routed experts beside quantised linears; vLLM loads them."
        )


def _note_expert_schemes(uses: list[Use], kept: Tensors) -> Iterator[str]:
    found = [use for use in uses if use.experts]
    if len(found) > 1:
        listed = ", ".join(describe(use.scheme) for use in found)
        yield f"routed experts: {listed} by layer; transformers 5.23 reads all as one scheme, vLLM as they are."


_NOTES: tuple[Callable[[list[Use], Tensors], Iterator[str]], ...] = (
    _note_bits,
    _note_group_size,
    _note_asymmetric,
    _note_scale_dtype,
    _note_int8_experts,
    _note_expert_width,
    _note_float8,
    _note_kept_experts,
    _note_expert_schemes,
)


def _is_expert(tensor: PlannedTensor) -> bool:
    return ".experts." in tensor.name


def _line(tensors: Tensors, text: str) -> str:
    more = f" and {len(tensors) - 1:,} more" if len(tensors) > 1 else ""
    return f"{tensors[0].module}{more} ({describe(tensors[0].scheme)}): {text}"
