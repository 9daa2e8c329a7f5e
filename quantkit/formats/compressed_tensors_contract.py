"""What the runtimes demand of a compressed-tensors checkpoint, checked on the plan, before any work.

`problems`: no runtime would load it, or would load it wrongly without a word. `notes`: loads, but not everywhere.
Each line names the module, what is planned and what is needed. Observed in vLLM 0.24 and 0.33 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from quantkit.formats.compressed_tensors_config import FUSED_PARTS, AnyScheme, is_module
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import Float8Scheme, IntScheme

MARLIN_GROUP_SIZES = (None, 32, 64, 128)
MARLIN_BITS = (4, 8)
WIDE_TENSOR_PARALLEL = 8
_PLAIN_IN_VLLM = ("mlp.gate", "eh_proj", "embed_tokens", "lm_head", "shared_head.head")
"""Modules that vLLM builds without a quantisation config: they need a plain ``weight``."""

Linears = dict[str, PlannedTensor]


def problems(planned: Sequence[PlannedTensor]) -> list[str]:
    """One line for each fault that makes the checkpoint unloadable or wrong; [] if there is none."""
    linears = {tensor.module: tensor for tensor in planned if is_module(tensor) or tensor.scheme is not None}
    return [*_plain_modules(linears), *_split_fused(linears), *_mixed_experts(linears), *_packed_zero_points(linears)]


def notes(planned: Sequence[PlannedTensor]) -> list[str]:
    """One line for each runtime that will not take this checkpoint, or takes it only in part."""
    linears = {tensor.module: tensor for tensor in planned if is_module(tensor) and tensor.scheme is not None}
    kept = [tensor for tensor in planned if is_module(tensor) and tensor.scheme is None]
    return [line for check in _NOTES for line in check(list(linears.values()), kept)]


def describe(scheme: AnyScheme | None) -> str:
    """A scheme in a few words: "int4 g128", "int8 channel asymmetric", "fp8 block", "unquantised"."""
    match scheme:
        case None:
            return "unquantised"
        case Float8Scheme():
            return "fp8 block"
        case IntScheme():
            group = "channel" if scheme.group_size is None else f"g{scheme.group_size}"
            return f"int{scheme.bits} {group}" + ("" if scheme.symmetric else " asymmetric")


# --- problems -----------------------------------------------------------------------------------------------------------------------


def _plain_modules(linears: Linears) -> Iterator[str]:
    for module, tensor in linears.items():
        if tensor.scheme is not None and any(module == plain or module.endswith(f".{plain}") for plain in _PLAIN_IN_VLLM):
            yield f"{module}: planned as {describe(tensor.scheme)}, but vLLM reads it only unquantised; keep it."


def _split_fused(linears: Linears) -> Iterator[str]:
    """gate and up, q_a and kv_a are one matrix in vLLM. The experts' are reported with their layer."""
    for fused, parts in FUSED_PARTS.items():
        for module in linears:
            parent, _, leaf = module.rpartition(".")
            members = [linears[f"{parent}.{part}"] for part in parts if f"{parent}.{part}" in linears]
            if leaf != parts[0] or _experts_of(module) or len(members) < len(parts):
                continue
            if len({member.scheme for member in members}) > 1:
                found = ", ".join(f"{part} {describe(m.scheme)}" for part, m in zip(parts, members, strict=True))
                yield f"{parent}: {found}; vLLM joins them into {fused}, so they need one scheme or must all be kept."


def _mixed_experts(linears: Linears) -> Iterator[str]:
    """All experts of a layer are two tensors in vLLM; it looks only at expert 0 and would read the others wrongly."""
    schemes: dict[str, dict[AnyScheme | None, str]] = {}
    for module, tensor in linears.items():
        if experts := _experts_of(module):
            schemes.setdefault(experts, {}).setdefault(tensor.scheme, module)
    for experts, found in schemes.items():
        if len(found) > 1:
            listed = ", ".join(f"{module.removeprefix(experts + '.')} {describe(s)}" for s, module in found.items())
            yield f"{experts}: {listed}; all projections of all experts of a layer need one scheme."


def _packed_zero_points(linears: Linears) -> Iterator[str]:
    for module, tensor in linears.items():
        scheme = tensor.scheme
        if isinstance(scheme, IntScheme) and not scheme.symmetric and tensor.info.shape[0] * scheme.bits % 32:
            yield (
                f"{module}: {tensor.info.shape[0]} zero points of {scheme.bits} bits do not fill whole 32-bit words, "
                "which vLLM needs; take symmetric: true or keep it."
            )


def _experts_of(module: str) -> str:
    """model.layers.3.mlp.experts.7.up_proj -> model.layers.3.mlp.experts, "" for other modules."""
    head, _, rest = module.partition(".experts.")
    return f"{head}.experts" if rest else ""


# --- notes --------------------------------------------------------------------------------------------------------------------------

Tensors = list[PlannedTensor]


def _note_bits(linears: Tensors, kept: Tensors) -> Iterator[str]:
    yield from _count(
        linears,
        lambda scheme: scheme.bits not in MARLIN_BITS,
        "vLLM's Marlin kernels take 4 and 8 bits; other widths load in transformers (dequantised), in vLLM at best by other kernels.",
    )


def _note_group_size(linears: Tensors, kept: Tensors) -> Iterator[str]:
    yield from _count(
        linears,
        lambda scheme: scheme.group_size not in MARLIN_GROUP_SIZES,
        "vLLM's Marlin kernels take group_size 32, 64, 128 or one scale a row.",
    )


def _note_asymmetric(linears: Tensors, kept: Tensors) -> Iterator[str]:
    yield from _count(
        linears, lambda scheme: not scheme.symmetric, "transformers 5.23 cannot load zero points; vLLM can."
    )


def _note_scale_dtype(linears: Tensors, kept: Tensors) -> Iterator[str]:
    yield from _count(
        linears,
        lambda scheme: scheme.scale_dtype == "float32",
        "vLLM rounds scales to the model's dtype when it loads; codes were chosen for float32 scales.",
    )


def _note_int8_experts(linears: Tensors, kept: Tensors) -> Iterator[str]:
    yield from _count(
        [tensor for tensor in linears if _experts_of(tensor.module)],
        lambda scheme: scheme.bits == 8 and scheme.group_size is not None,
        "vLLM 0.24 takes 8-bit routed experts only with group_size null (0.33 takes groups too).",
    )


def _note_expert_width(linears: Tensors, kept: Tensors) -> Iterator[str]:
    """Tensor parallelism cuts the input of down_proj; a group must not be cut."""
    for tensor in linears:
        scheme = tensor.scheme
        if not _experts_of(tensor.module) or not tensor.module.endswith(".down_proj") or not isinstance(scheme, IntScheme):
            continue
        ways = scheme.n_groups(tensor.info.shape[1])
        if scheme.group_size is not None and ways < WIDE_TENSOR_PARALLEL:
            yield (
                f"{tensor.module}: {tensor.info.shape[1]} inputs are {ways} groups of {scheme.group_size}, so vLLM can split "
                f"experts over at most {ways} GPUs by tensor parallelism; expert and pipeline parallelism are not limited."
            )
        return


def _note_float8(linears: Tensors, kept: Tensors) -> Iterator[str]:
    float8 = [tensor for tensor in linears if isinstance(tensor.scheme, Float8Scheme)]
    if not float8:
        return
    yield (
        f"{float8[0].module} and {len(float8) - 1:,} more: fp8 block; vLLM rounds their inputs to FP8 too (as DeepSeek serves them), "
        "on GPUs without FP8 it computes in 16 bits."
    )
    if any(_experts_of(tensor.module) for tensor in float8):
        yield "fp8 block routed experts: transformers 5.23 cannot load them; vLLM can."


def _note_kept_experts(linears: Tensors, kept: Tensors) -> Iterator[str]:
    experts = [tensor for tensor in kept if _experts_of(tensor.module)]
    layers = {tensor.layer for tensor in linears}
    served = [tensor for tensor in experts if tensor.layer is None or tensor.layer in layers]
    if linears and served:
        yield (
            f"{served[0].module} and {len(served) - 1:,} more: unquantised routed experts beside quantised linears; "
            "transformers 5.23 drops them while loading; vLLM loads them."
        )


def _note_expert_schemes(linears: Tensors, kept: Tensors) -> Iterator[str]:
    schemes = {tensor.scheme: None for tensor in linears if _experts_of(tensor.module)}
    if len(schemes) > 1:
        listed = ", ".join(describe(scheme) for scheme in schemes)
        yield f"routed experts: {listed} in different layers; transformers 5.23 reads all of them as one; vLLM loads them."


_NOTES: tuple[Callable[[Tensors, Tensors], Iterator[str]], ...] = (
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


def _count(linears: Tensors, applies: Callable[[IntScheme], bool], text: str) -> Iterator[str]:
    """One line for each scheme it applies to, naming the first module and how many more."""
    found: dict[IntScheme, list[str]] = {}
    for tensor in linears:
        if isinstance(tensor.scheme, IntScheme) and applies(tensor.scheme):
            found.setdefault(tensor.scheme, []).append(tensor.module)
    for scheme, modules in found.items():
        more = f" and {len(modules) - 1:,} more" if len(modules) > 1 else ""
        yield f"{modules[0]}{more}: {describe(scheme)}; {text}"
