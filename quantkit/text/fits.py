"""Whether an output fits the GPUs of --gpus, as text and as a document: under vLLM, or under llama.cpp for GGUF."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.formats.sizes import short_size
from quantkit.plan.forecast import OutputFit
from quantkit.runtimes.llama_cpp.memory import UBATCH, LlamaFit
from quantkit.runtimes.vllm.memory import UTILIZATIONS, Fit
from quantkit.text.tables import GIB


def fit_text(found: OutputFit) -> str:
    """Some lines for people."""
    fit_, command = found.fit, found.command
    lines = [f"on {fit_.gpus}:", *(_llama_lines(fit_) if isinstance(fit_, LlamaFit) else _vllm_lines(fit_))]
    if command:
        lines += [
            f"  fits, with room for {fit_.spare_kv_tokens:,} more tokens of KV cache. Estimated, not run. Serve with",
            f"  {command}",
        ]
    return "\n".join(lines)


def _vllm_lines(found: Fit) -> list[str]:
    lines = [f"  not {refused}" for refused in found.refused]
    placement = found.placement
    if placement is None:
        return [*lines, "  does not fit: no way to spread the model over these GPUs."]
    kv_bytes = placement.kv_bytes_per_token * placement.context
    stages = "/".join(f"{weights / GIB:.1f}" for weights in placement.stage_weights)
    lines.append(
        f"  TP={placement.tensor_parallel} PP={len(placement.partition)}: weights {stages} GiB a GPU, "
        f"runtime {placement.runtime_bytes / GIB:.1f} GiB, KV cache {kv_bytes / GIB:.2f} GiB "
        f"for {placement.context:,} tokens; a GPU has {found.gpus.total_bytes / GIB:.1f} GiB"
    )
    if found.utilization is None:
        needed, usable = placement.needed_bytes / GIB, max(UTILIZATIONS) * found.gpus.total_bytes / GIB
        lines.append(f"  does not fit: {needed:.1f} GiB needed, {usable:.1f} GiB usable.")
    return lines


def _llama_lines(found: LlamaFit) -> list[str]:
    layers = "/".join(map(str, found.layers))
    weights = "/".join(f"{nbytes / GIB:.1f}" for nbytes in found.weights)
    lines = [
        f"  llama.cpp, layers {layers}: weights {weights} GiB a GPU; embeddings, {short_size(found.host_bytes)}, "
        "stay in RAM",
        f"  KV cache {max(found.kv_bytes) / GIB:.2f} GiB for {found.context:,} tokens (F16), buffers "
        f"{found.buffer_bytes / GIB:.1f} GiB (allowance, batches of {UBATCH} tokens); a GPU has "
        f"{found.gpus.total_bytes / GIB:.1f} GiB",
    ]
    if not found.fits:
        needed, usable = max(found.needed_bytes) / GIB, found.gpus.total_bytes / GIB
        lines.append(f"  does not fit: {needed:.1f} GiB needed on the fullest GPU, {usable:.1f} GiB there.")
    return lines


def fit_document(found: OutputFit) -> Mapping[str, object]:
    """The fit of one output for --json. Bytes a GPU: of the stages under vLLM, of every GPU under llama.cpp."""
    fit_, command = found.fit, found.command
    document = _llama_document(fit_) if isinstance(fit_, LlamaFit) else _vllm_document(fit_)
    if command:
        document |= {"spare_kv_tokens": fit_.spare_kv_tokens, "command": command}
    return document


def _vllm_document(found: Fit) -> dict[str, object]:
    placement = found.placement
    document: dict[str, object] = {
        "runtime": "vllm",
        "gpus": str(found.gpus),
        "fits": found.utilization is not None,
        "refused": list(found.refused),
    }
    if placement is not None:
        document |= {
            "tensor_parallel": placement.tensor_parallel,
            "layer_partition": list(placement.partition),
            "weights_bytes": list(placement.stage_weights),
            "needed_bytes": placement.needed_bytes,
            "context": placement.context,
        }
    if found.utilization is not None:
        document["utilization"] = found.utilization
    return document


def _llama_document(found: LlamaFit) -> dict[str, object]:
    return {
        "runtime": "llama.cpp",
        "gpus": str(found.gpus),
        "fits": found.fits,
        "layer_partition": list(found.layers),
        "weights_bytes": list(found.weights),
        "kv_bytes": list(found.kv_bytes),
        "buffer_bytes": found.buffer_bytes,
        "host_bytes": found.host_bytes,
        "needed_bytes": max(found.needed_bytes),
        "context": found.context,
    }
