"""How vLLM is started on a folder."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import IntScheme

MAX_SEQS, MAX_BATCHED_TOKENS = 16, 2048
"""What the options here allow at once, and what `memory` allows for."""


def serve(folder: str, tensors: Iterable[PlannedTensor] = ()) -> str:
    """The command that serves a folder with vLLM's own settings; in float16 where integers have scales in it, which
    vLLM would round to bfloat16."""
    schemes = (tensor.scheme for tensor in tensors)
    halves = any(isinstance(scheme, IntScheme) and scheme.scale_dtype == "float16" for scheme in schemes)
    return f"vllm serve {folder}{' --dtype float16' if halves else ''}"


def serve_spread(
    folder: str, tensor_parallel: int, partition: tuple[int, ...], context: int, utilization: float
) -> str:
    """The command that serves a folder over several GPUs. ``partition``: decoder layers of each pipeline stage;
    ``context``: tokens of the longest sequence."""
    parts = [serve(folder)]
    if len(partition) > 1:
        parts.insert(0, f"VLLM_PP_LAYER_PARTITION={','.join(map(str, partition))}")
        parts += ["--pipeline-parallel-size", str(len(partition))]
    if tensor_parallel > 1:
        parts += ["--tensor-parallel-size", str(tensor_parallel)]
    parts += ["--max-num-seqs", str(MAX_SEQS), "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
    parts += ["--max-model-len", str(context), "--gpu-memory-utilization", str(utilization)]
    return " ".join(parts)
