"""vLLM's load contract beyond `quantkit.runtimes.vllm.contract`, which is held against plans too: what config.json must
say, and how a model may be cut. Read in vLLM 0.24 and 0.33, much of it tried in 0.24."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from quantkit.formats.layouts.compressed_tensors_config import is_module, mistakes
from quantkit.formats.planned import PlannedTensor
from quantkit.runtimes.vllm import contract
from quantkit.runtimes.vllm.tensor_parallel import cut_problem, cuts_of
from quantkit.tensors import Projection, Role
from quantkit.verify import vllm_integers
from quantkit.verify.checkpoint import Checkpoint
from quantkit.verify.completeness import stored_mtp_layers
from quantkit.verify.stated import BITSANDBYTES, by_class_alone

NAMED = 3
WANTED_KEYS: Mapping[str, Mapping[str, str]] = {
    "glm4_moe_lite": {"first_k_dense_replace": "ends with an AttributeError"},
    "glm_moe_dsa": {
        "scoring_func": "scores experts by softmax in place of sigmoid, without a word",
        "topk_method": "ends with a KeyError for the router's bias",
    },
}
"""By model_type, keys that transformers does without and vLLM 0.24 does not, and what it does then."""
BITSANDBYTES_UNREAD = "quant_method is bitsandbytes: vLLM 0.33 does not read it, transformers does."


def faults(checkpoint: Checkpoint, tensor_parallel: int, pipeline_parallel: int) -> Iterator[str]:
    """What keeps vLLM from loading the folder, or makes it compute something else."""
    present = in_files(checkpoint)
    if checkpoint.method == BITSANDBYTES:
        yield BITSANDBYTES_UNREAD
    yield from contract.problems(present, checkpoint.layout)
    for check in _FAULTS:
        yield from check(checkpoint)
    yield from vllm_integers.faults(checkpoint)
    yield from _parallel(checkpoint, tensor_parallel, pipeline_parallel)


def notes(checkpoint: Checkpoint) -> Iterator[str]:
    """What it takes otherwise than one may expect."""
    yield from contract.notes(in_files(checkpoint), checkpoint.layout)
    if _n_mtp(checkpoint) and not stored_mtp_layers(checkpoint):
        yield "config.json counts MTP layers and none is stored: speculative decoding by MTP is refused."


def in_files(checkpoint: Checkpoint) -> list[PlannedTensor]:
    """The family's tensors without MTP layers that were dropped as a whole."""
    layers = stored_mtp_layers(checkpoint)
    return [tensor for tensor in checkpoint.planned if tensor.role is not Role.MTP or tensor.layer in layers]


def _absent_keys(checkpoint: Checkpoint) -> Iterator[str]:
    """What the family's own config.json says, and a rebuilt one may have lost."""
    for key, consequence in WANTED_KEYS.get(str(checkpoint.config.get("model_type")), {}).items():
        if key not in checkpoint.config:
            yield f"config.json: {key} is missing; vLLM {consequence}. Take it from the official config.json."


def _caught_tables(checkpoint: Checkpoint) -> Iterator[str]:
    """vLLM 0.33 takes embeddings and head for quantised if a name or pattern names them."""
    resolver = checkpoint.resolver
    if resolver is None:
        return
    for tensor in checkpoint.planned:
        if tensor.role is Role.EMBED and resolver.naming(tensor.module) and resolver.scheme(tensor.module) is not None:
            yield f"{tensor.module}: a target of config.json matches it, vLLM 0.33 then expects it quantised."


def _fused_names(checkpoint: Checkpoint) -> Iterator[str]:
    """vLLM looks for its fused modules, gate_up_proj and the like, under their own names."""
    resolver = checkpoint.resolver
    if resolver is None:
        return
    modules = [tensor for tensor in in_files(checkpoint) if is_module(tensor)]
    modules = [t for t in modules if t.scheme is not None or t.spec is None or not by_class_alone(resolver, t.spec)]
    wrong = mistakes(resolver.targets, modules)
    if wrong:
        more = f" and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
        yield f"{', '.join(wrong[:NAMED])}{more}: the targets of config.json give another scheme than their parts have."


def _global_scales(checkpoint: Checkpoint) -> Iterator[str]:
    """Of NVFP4: vLLM takes one for the modules that it joins, and only warns if they differ."""
    joined: dict[tuple[str, str], list[str]] = {}
    stored = checkpoint.raw.infos()
    for tensor in in_files(checkpoint):
        name = f"{tensor.name}_global_scale"
        module = _joined_into(tensor)
        if module is not None and name in stored:
            joined.setdefault((tensor.module.rpartition(".")[0], module), []).append(name)
    different = [names for names in joined.values() if len({_number(checkpoint, name) for name in names}) > 1]
    if different:
        more = f" and {len(different) - 1:,} more such groups" if len(different) > 1 else ""
        yield (
            f"{' and '.join(different[0])}{more}: differ, but vLLM joins these linears and takes one: the others are "
            "computed wrongly."
        )


def _joined_into(tensor: PlannedTensor) -> str | None:
    """Name of the module that vLLM makes of a linear and its neighbours; experts' gate and up are one tensor, too."""
    if tensor.spec is None:
        return None
    is_half = tensor.expert is not None and tensor.spec.projection in (Projection.GATE, Projection.UP)
    return Projection.GATE.value if is_half else tensor.spec.fused


def _number(checkpoint: Checkpoint, name: str) -> float:
    return float(checkpoint.raw.read(name).flatten()[0])


def _stale_keys(checkpoint: Checkpoint) -> Iterator[str]:
    """Keys of compressed-tensors that vLLM refuses."""
    if checkpoint.section.get("sparsity_config"):
        yield "quantization_config.sparsity_config: vLLM 0.33 refuses it."
    for name, group in _groups(checkpoint):
        if group.get("actorder") in ("group", "dynamic"):
            yield f"config_groups.{name}: actorder {group['actorder']!r} is refused by vLLM; its kernels take no g_idx."
        if group.get("strategy") == "channel" and group.get("group_size", -1) is None:
            yield f"config_groups.{name}: group_size null ends vLLM 0.24 with a TypeError for experts; write -1."


def _groups(checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, object]]]:
    found = checkpoint.section.get("config_groups")
    for name, group in cast("dict[str, object]", found if isinstance(found, dict) else {}).items():
        weights = cast("dict[str, object]", group).get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield name, cast("dict[str, object]", weights)


def _mtp(checkpoint: Checkpoint) -> Iterator[str]:
    marker = checkpoint.arch.variants().mtp_marker
    stored = any(marker and name.endswith(marker) for name in checkpoint.raw.infos())
    if stored and not _n_mtp(checkpoint):
        yield "num_nextn_predict_layers is 0 and an MTP layer is stored: vLLM ends with a KeyError. Set it to 1."


def _n_mtp(checkpoint: Checkpoint) -> int:
    return len({tensor.layer for tensor in checkpoint.planned if tensor.role is Role.MTP})


_FAULTS: tuple[Callable[[Checkpoint], Iterator[str]], ...] = (
    _absent_keys,
    _caught_tables,
    _fused_names,
    _global_scales,
    _stale_keys,
    _mtp,
)


def _parallel(checkpoint: Checkpoint, tensor_parallel: int, pipeline_parallel: int) -> Iterator[str]:
    sizes = checkpoint.arch.serving()
    problem = cut_problem(cuts_of(in_files(checkpoint)), sizes.heads, tensor_parallel, sizes.kv_heads)
    if problem is not None:
        yield f"tensor parallelism over {tensor_parallel} GPUs: {problem}."
    if pipeline_parallel > checkpoint.arch.n_layers:
        yield f"pipeline parallelism over {pipeline_parallel} GPUs: there are {checkpoint.arch.n_layers} layers."
