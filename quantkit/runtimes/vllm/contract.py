"""What vLLM demands of a quantised folder, checked on the plan, before any work: of its modules in any layout, and of
each layout.

`problems`: it would not load, or would be read wrongly without a word. `notes`: loads, but not everywhere. Each line
names the module, what is planned and what is needed.
Observed in vLLM 0.24 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from quantkit.arch.base import ServingSizes
from quantkit.formats.bitpack import WORD_BITS
from quantkit.formats.layouts.compressed_tensors_config import KEPT, is_module, numbered_schemes
from quantkit.formats.planned import PlannedTensor
from quantkit.runtimes.linears import Check, LinearsByScheme, Use, by_scheme, line
from quantkit.runtimes.vllm.tensor_parallel import cut_of, cuts_of, most_ranks
from quantkit.schemes import Float8Scheme, IntScheme, Mxfp8Scheme, W4AFp8Scheme, describe
from quantkit.tensors import Projection, Role, TensorSpec

COMPRESSED_TENSORS, GPTQ, GPTQ_V2, AWQ = "compressed-tensors", "gptq", "gptq_v2", "awq"
BITSANDBYTES = "bitsandbytes"
"""Layouts of which something is known beyond what holds for all."""
MARLIN_GROUP_SIZES = (None, 32, 64, 128)
MARLIN_BITS = (4, 8)
HUMMING_SMALLEST_GROUP = 16
"""With inputs of 16 bits."""
PADDED_BITS = (3, 5, 6, 7)
"""Widths of which compressed-tensors packed whole codes into words before it packed a stream of bits."""
SPARSE_CAPABILITY = 9.0
SPARSE_NEEDS = (
    f"vLLM 0.33 has kernels of sparse attention for compute capability {SPARSE_CAPABILITY} and more (H100, H200, "
    "B200), none for A100; llama.cpp runs it anywhere"
)
CHOICES = tuple(
    IntScheme.model_validate({"bits": bits, "group_size": size}) for bits in (2, 3, 4, 8) for size in (128, 64, 32)
)
"""What is chosen among for a given size: Marlin takes 4 and 8 bits, Humming (0.33) the others."""
UNSEEN = IntScheme.model_validate({"bits": 8, "group_size": 128})
"""int8 g128, of linears of which no sensitivity is known."""
WIDE_TENSOR_PARALLEL = 8
W4AFP8_WIDTH = 128
"""Outputs of a module, as of its inputs, of which vLLM's kernel for int4 with FP8 inputs takes multiples."""
_PLAIN_ROLES = (Role.ROUTER, Role.EMBED, Role.LM_HEAD)
"""vLLM builds these modules, and the input projection of an MTP layer, without a quantisation config: they need a plain
``weight``."""

Planned = list[tuple[PlannedTensor, int]]
"""Planned tensors, each with a number that stands for its scheme."""


def problems(planned: Sequence[PlannedTensor], layout: str) -> list[str]:
    """One line for each fault that makes a checkpoint in this layout unloadable or wrong; [] if there is none."""
    _, keys = numbered_schemes(tensor.scheme for tensor in planned)
    found = [(t, key) for t, key in zip(planned, keys, strict=True) if key != KEPT or is_module(t)]
    experts = [(tensor, key) for tensor, key in found if tensor.expert is not None]
    others = [(tensor, key) for tensor, key in found if tensor.expert is None]
    return [
        *_plain_modules(others),
        *_split_fused(others),
        *_mixed_experts(experts),
        *(text for check in _PROBLEMS_OF.get(layout, ()) for text in check([*others, *experts])),
    ]


def notes(planned: Sequence[PlannedTensor], layout: str) -> list[str]:
    """One line for each thing that vLLM will not take of this layout, or take only in part."""
    linears = by_scheme(planned)
    return [text for check in _NOTES_OF.get(layout, ()) for text in check(linears)]


def joined(spec: TensorSpec) -> str:
    """Name of the module in which vLLM holds a linear: linears with the same name need one scheme."""
    module = spec.name.removesuffix(".weight")
    if spec.expert is not None:
        return module.rpartition(f".{spec.expert}.")[0]
    return module if spec.fused is None else f"{module.rpartition('.')[0]}.{spec.fused}"


def attention_notes(sizes: ServingSizes) -> list[str]:
    """One line if the model's attention is none that vLLM runs on every GPU."""
    return [] if sizes.sparse_top_k is None else [f"{SPARSE_NEEDS}."]


# --- problems ---------------------------------------------------------------------------------------------------------


def _plain_modules(planned: Planned) -> Iterator[str]:
    for tensor, key in planned:
        if key != KEPT and tensor.spec is not None and is_plain(tensor.spec):
            yield f"{tensor.module}: planned as {describe(tensor.scheme)}, but vLLM reads it only unquantised; keep it."


def is_plain(spec: TensorSpec) -> bool:
    """Whether vLLM builds the module without a quantisation config, so that a target that is a class never takes it."""
    return spec.base_role in _PLAIN_ROLES or spec.projection is Projection.MTP_INPUT


def _split_fused(planned: Planned) -> Iterator[str]:
    """Linears that are one matrix in vLLM, such as gate and up; those of MLPs first."""
    members: dict[tuple[str, str], Planned] = {}
    for tensor, key in planned:
        if tensor.spec is not None and tensor.spec.fused is not None:
            parent = tensor.module.rpartition(".")[0]
            members.setdefault((parent, tensor.spec.fused), []).append((tensor, key))
    for (parent, fused), parts in sorted(members.items(), key=lambda item: _is_attention(item[1])):
        if len({key for _, key in parts}) > 1:
            found = ", ".join(f"{tensor.module.rpartition('.')[2]} {describe(tensor.scheme)}" for tensor, _ in parts)
            yield f"{parent}: {found}; vLLM joins them into {fused}, so they need one scheme or must all be kept."


def _is_attention(planned: Planned) -> bool:
    return any(tensor.spec is not None and tensor.spec.base_role is Role.ATTENTION for tensor, _ in planned)


def _mixed_experts(planned: Planned) -> Iterator[str]:
    """All experts of a layer are two tensors in vLLM; it looks only at expert 0 and would read the others wrongly."""
    first_of: dict[str, dict[int, PlannedTensor]] = {}
    for tensor, key in planned:
        experts = tensor.module.rpartition(f".{tensor.expert}.")[0]  # "model.layers.3.mlp.experts"
        first_of.setdefault(experts.rpartition(".")[0], {}).setdefault(key, tensor)
    for parent, first in first_of.items():
        if len(first) > 1:
            listed = ", ".join(f"{t.module.removeprefix(parent + '.')} {describe(t.scheme)}" for t in first.values())
            yield f"{parent}: {listed}; all projections of all experts of a layer need one scheme."


def _packed_zero_points(planned: Planned) -> Iterator[str]:
    for tensor, _ in planned:
        scheme = tensor.scheme
        if isinstance(scheme, IntScheme) and not scheme.symmetric and tensor.info.shape[0] * scheme.bits % WORD_BITS:
            yield (
                f"{tensor.module}: {tensor.info.shape[0]} zero points of {scheme.bits} bits do not fill whole 32-bit "
                "words, which vLLM needs; take symmetric: true or keep it."
            )


def _widths_of_w4afp8(planned: Planned) -> Iterator[str]:
    """Linears other than routed experts, which go through a kernel of their own."""
    modules: dict[str, Planned] = {}
    for tensor, key in planned:
        if isinstance(tensor.scheme, W4AFp8Scheme) and tensor.expert is None:
            fused = tensor.spec.fused if tensor.spec is not None else None
            parent = tensor.module.rpartition(".")[0]
            modules.setdefault(f"{parent}.{fused}" if fused else tensor.module, []).append((tensor, key))
    outputs = {module: sum(tensor.info.shape[0] for tensor, _ in parts) for module, parts in modules.items()}
    wrong = [module for module, width in outputs.items() if width % W4AFP8_WIDTH]
    if wrong:
        more = f" and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        scheme = modules[wrong[0]][0][0].scheme
        yield (
            f"{wrong[0]}{more}: {outputs[wrong[0]]:,} outputs as {describe(scheme)}; vLLM's kernel takes multiples of "
            f"{W4AFP8_WIDTH}: take integers or keep them."
        )


_PROBLEMS_OF: Mapping[str, tuple[Callable[[Planned], Iterator[str]], ...]] = {
    COMPRESSED_TENSORS: (_packed_zero_points, _widths_of_w4afp8)
}
"""What vLLM demands of one layout beyond what its modules demand of all."""


# --- notes ------------------------------------------------------------------------------------------------------------


def _integers(linears: LinearsByScheme) -> Iterable[tuple[Use, IntScheme]]:
    """Uses of integer schemes."""
    return ((use, use.scheme) for use in linears.uses if isinstance(use.scheme, IntScheme))


def _note_bits(linears: LinearsByScheme) -> Iterator[str]:
    """Widths beside 4 and 8 bits: vLLM's other kernels unpack vLLM's way, transformers by compressed-tensors."""
    for use, scheme in _integers(linears):
        if scheme.bits in MARLIN_BITS:
            continue
        text = (
            f"vLLM multiplies {scheme.bits} bits from 0.33 on, by its Humming kernels, which it compiles at the first "
            "start (GPUs from compute capability 8.0 on; in float16 7.5)"
        )
        old = "; transformers needs compressed-tensors 0.18 or newer for it, vLLM 0.33 installs 0.17"
        yield line(use.tensors, f"{text}{old if scheme.bits in PADDED_BITS else ''}.")


def _note_group_size(linears: LinearsByScheme) -> Iterator[str]:
    for use, scheme in _integers(linears):
        if scheme.bits not in MARLIN_BITS:
            if scheme.group_size is not None and scheme.group_size < HUMMING_SMALLEST_GROUP:
                yield line(use.tensors, f"vLLM's Humming kernels take groups of {HUMMING_SMALLEST_GROUP} or more.")
        elif scheme.group_size not in MARLIN_GROUP_SIZES:
            yield line(use.tensors, "vLLM's Marlin kernels take group_size 32, 64, 128 or null (one scale a row).")


def _note_expert_rows(linears: LinearsByScheme) -> Iterator[str]:
    """The loader of experts asserts the strategy "group" for every kernel but Marlin; read in 0.33, not tried."""
    for use, scheme in _integers(linears):
        if not use.experts or scheme.group_size is not None:
            continue
        by_marlin = scheme.bits in MARLIN_BITS
        where = "takes Humming kernels on H100 and H200" if by_marlin else "has only Humming kernels for this width"
        way = "take group_size 128" + (", or start it with --moe-backend marlin" if by_marlin else "")
        text = f"vLLM 0.33 {where}, and ends with an AssertionError for experts with one scale a row; {way}."
        yield line(use.experts, text)


def _note_zero_points(linears: LinearsByScheme) -> Iterator[str]:
    for use, scheme in _integers(linears):
        if not scheme.symmetric and scheme.bits == 8:
            yield line(use.tensors, "vLLM multiplies 8 bits with zero points from 0.33 on, by its Humming kernels.")


def _note_scale_dtype(linears: LinearsByScheme) -> Iterator[str]:
    rounds = "vLLM rounds scales to the model's dtype when it loads"
    texts = {
        "float32": f"{rounds}, but codes were chosen for float32 scales.",
        "float16": f"{rounds}: float16 ones need --dtype float16, unless config.json says it.",
    }
    for use, scheme in _integers(linears):
        if scheme.scale_dtype in texts:
            yield line(use.tensors, texts[scheme.scale_dtype])


def _note_int8_experts(linears: LinearsByScheme) -> Iterator[str]:
    text = "vLLM 0.24 takes 8-bit routed experts only with group_size null (0.33 takes groups too)."
    for use, scheme in _integers(linears):
        if use.experts and scheme.bits == 8 and scheme.group_size:
            yield line(use.experts, text)


def _note_row_parallel(linears: LinearsByScheme) -> Iterator[str]:
    """Tensor parallelism cuts the inputs of attention's and the MLPs' last linears; a group must not be cut. Expert
    parallelism spares the experts, and nothing else."""
    tensors = [*linears.kept, *(tensor for use in linears.uses for tensor in use.tensors)]
    cut = [tensor for tensor in tensors if cut_of(tensor) is not None and tensor.role is not Role.MTP]
    others, other = _tightest([tensor for tensor in cut if tensor.expert is None])
    experts, expert = _tightest([tensor for tensor in cut if tensor.expert is not None])
    if experts < min(others, WIDE_TENSOR_PARALLEL):
        yield f"{expert}, so {_split('experts', experts)}; expert and pipeline parallelism are free."
    if others < WIDE_TENSOR_PARALLEL:
        yield f"{other}, so {_split('the model', others)}; pipeline parallelism is free."


def _split(what: str, ranks: int) -> str:
    if ranks == 1:
        return f"vLLM cannot split {what} by tensor parallelism"
    return f"vLLM can split {what} over at most {ranks} GPUs by tensor parallelism"


def _tightest(tensors: Sequence[PlannedTensor]) -> tuple[int, str]:
    """Ranks that all of these can be cut for, and the linear that allows no more."""
    cuts = cuts_of(tensors)
    if not cuts:
        return WIDE_TENSOR_PARALLEL, ""
    cut = min(cuts, key=most_ranks)
    in_features, group = cut
    module = cuts[cut].removesuffix(".weight")
    groups = -(-in_features // group)
    counted = f"1 group of {group}" if groups == 1 else f"{groups} groups of {group}"
    return most_ranks(cut), f"{module}: {in_features} inputs are {counted}"


def _note_gptq(linears: LinearsByScheme) -> Iterator[str]:
    for use, scheme in _integers(linears):
        if scheme.bits not in MARLIN_BITS or not scheme.symmetric:
            yield line(use.tensors, "vLLM takes GPTQ checkpoints of 4 and 8 bits, symmetric; gptqmodel takes this.")


def _note_zero_points_of_v1(linears: LinearsByScheme) -> Iterator[str]:
    text = "gptqmodel loads zero points of GPTQ v1 only where it wrote them itself; take format: gptq_v2."
    for use, scheme in _integers(linears):
        if not scheme.symmetric:
            yield line(use.tensors, text)


def _note_bitsandbytes(linears: LinearsByScheme) -> Iterator[str]:
    for use in linears.uses:
        yield line(use.tensors, "vLLM 0.33 does not read bitsandbytes; transformers does.")


def _note_float8(linears: LinearsByScheme) -> Iterator[str]:
    text = "vLLM rounds their inputs to FP8 too (as DeepSeek serves them); GPUs without FP8 compute in 16 bits."
    for use in linears.uses:
        if isinstance(use.scheme, Float8Scheme):
            yield line(use.tensors, text)


def _note_w4afp8(linears: LinearsByScheme) -> Iterator[str]:
    text = (
        "vLLM has kernels for it on Hopper alone (compute capability 9.0: H100, H200), for models in bfloat16. They "
        "round inputs, scales, and products of codes and scales to FP8. SGLang's own quant_method w4afp8 is another "
        "format."
    )
    for use in linears.uses:
        if isinstance(use.scheme, W4AFp8Scheme):
            yield line(use.tensors, text)


def _note_mxfp8(linears: LinearsByScheme) -> Iterator[str]:
    text = (
        "vLLM reads it (0.24 or newer). On Blackwell it rounds their inputs to MXFP8 too; on other GPUs from compute "
        "capability 7.5 on Marlin kernels compute in 16 bits."
    )
    for use in linears.uses:
        if isinstance(use.scheme, Mxfp8Scheme):
            yield line(use.tensors, text)


_GPTQ_NOTES = (_note_gptq, _note_group_size, _note_scale_dtype, _note_row_parallel)
_NOTES_OF: Mapping[str, tuple[Check, ...]] = {
    COMPRESSED_TENSORS: (
        _note_bits,
        _note_group_size,
        _note_expert_rows,
        _note_zero_points,
        _note_scale_dtype,
        _note_int8_experts,
        _note_row_parallel,
        _note_float8,
        _note_w4afp8,
        _note_mxfp8,
    ),
    GPTQ: (*_GPTQ_NOTES, _note_zero_points_of_v1),
    GPTQ_V2: _GPTQ_NOTES,
    BITSANDBYTES: (_note_bitsandbytes,),
    AWQ: (_note_group_size, _note_scale_dtype, _note_row_parallel),
}
