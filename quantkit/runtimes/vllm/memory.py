"""Whether a planned checkpoint fits a set of GPUs under vLLM, with the command that serves it.

    per GPU:  utilisation * total >= weights + activations + CUDA graphs + KV cache of one full context

Rules from vLLM's source (0.24 and 0.33) for DeepSeek's MLA models: q_a, kv_a and the router are replicated under
tensor parallelism; the two halves of kv_b are kept once more in BF16; the latent KV cache is replicated under tensor
and divided under pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from quantkit.runtimes.gpus import GIB, Gpus, ModelFacts, SizedOutput, partition_layers
from quantkit.schemes import IntScheme
from quantkit.tensors import Role

UTILIZATIONS = (0.92, 0.95)
"""vLLM's default, and what a machine that does nothing else can give."""
RUNTIME_BYTES = GIB
"""CUDA context, NCCL buffers, allocator rounding."""
GRAPH_BYTES = GIB
MAX_SEQS, MAX_BATCHED_TOKENS = 16, 2048
_REPLICATED = (".q_a_proj.weight", ".kv_a_proj_with_mqa.weight")
_ROW_PARALLEL = (".o_proj.weight", ".down_proj.weight")
_KV_B = ".kv_b_proj.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to spread the model. Bytes are per GPU, of the fullest stage; ``partition``: decoder layers of each
    pipeline stage."""

    tensor_parallel: int
    partition: tuple[int, ...]
    stage_weights: tuple[int, ...]
    runtime_bytes: int
    kv_bytes_per_token: int
    context: int

    @property
    def needed_bytes(self) -> int:
        """Memory that the fullest GPU needs with one sequence of full length."""
        return max(self.stage_weights) + self.runtime_bytes + self.kv_bytes_per_token * self.context


@dataclass(frozen=True, slots=True)
class Fit:
    """The verdict. ``utilization``: the smallest of vLLM's settings that is enough; None: does not fit. ``layout``:
    None if none is legal."""

    gpus: Gpus
    layout: Layout | None
    utilization: float | None
    refused: tuple[str, ...]

    @property
    def spare_kv_tokens(self) -> int:
        """Tokens of KV cache beyond the one full context."""
        if self.layout is None or self.utilization is None:
            return 0
        free = round(self.utilization * self.gpus.total_bytes) - self.layout.needed_bytes
        return free // self.layout.kv_bytes_per_token

    def command(self, out: str) -> str:
        """The vLLM command for this layout."""
        assert self.layout is not None
        assert self.utilization is not None
        parts = ["vllm", "serve", out]
        stages = len(self.layout.partition)
        if stages > 1:
            parts.insert(0, f"VLLM_PP_LAYER_PARTITION={','.join(map(str, self.layout.partition))}")
            parts += ["--pipeline-parallel-size", str(stages)]
        if self.layout.tensor_parallel > 1:
            parts += ["--tensor-parallel-size", str(self.layout.tensor_parallel)]
        parts += ["--max-num-seqs", str(MAX_SEQS), "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
        parts += ["--max-model-len", str(self.layout.context), "--gpu-memory-utilization", str(self.utilization)]
        return " ".join(parts)


def fit(plan: SizedOutput, config: Mapping[str, object], n_layers: int, gpus: Gpus, context: int) -> Fit:
    """The first layout that fits, tensor parallelism preferred; else the one that comes nearest, with ``utilization``
    None.

    ``config`` is the raw config.json. Raises `PlanError` if the model is not made for ``context`` tokens.
    """
    facts = ModelFacts.of(config, context)
    weights = _Weights.of(plan, n_layers)
    refused: list[str] = []
    layouts: list[Layout] = []
    for tensor_parallel in sorted((n for n in range(1, gpus.count + 1) if gpus.count % n == 0), reverse=True):
        stages = gpus.count // tensor_parallel
        problem = _tensor_parallel_problem(weights, facts, tensor_parallel)
        if problem is None and stages > n_layers:
            problem = f"{stages} pipeline stages for {n_layers} layers"
        if problem is not None:
            refused.append(f"TP={tensor_parallel} PP={stages}: {problem}")
            continue
        layouts.append(_layout(weights, facts, tensor_parallel, stages, context))
    for utilization in UTILIZATIONS:
        for layout in layouts:
            if layout.needed_bytes <= utilization * gpus.total_bytes:
                return Fit(gpus, layout, utilization, tuple(refused))
    nearest = min(layouts, key=lambda layout: layout.needed_bytes, default=None)
    return Fit(gpus, nearest, None, tuple(refused))


@dataclass(frozen=True, slots=True)
class _Weights:
    """Bytes after loading, MTP left out: [first stage's embedding, layer 0, ..., last layer, final norm and head].
    ``whole`` is on every tensor-parallel rank, ``divided`` is cut. ``cuts``: (in_features, group_size) of the linears
    whose inputs are cut, with one's name."""

    whole: list[int]
    divided: list[int]
    cuts: Mapping[tuple[int, int], str]

    @classmethod
    def of(cls, plan: SizedOutput, n_layers: int) -> _Weights:
        whole, divided = [0] * (n_layers + 2), [0] * (n_layers + 2)
        cuts: dict[tuple[int, int], str] = {}
        measured: dict[tuple[object, ...], int] = {}
        for tensor in plan.planned:
            spec, scheme = tensor.spec, tensor.scheme
            assert spec is not None, f"{tensor.name}: planned without a family"
            if spec.role is Role.MTP:
                continue
            key = (spec.shape, scheme, tensor.keep_dtype)
            if key not in measured:
                measured[key] = plan.stored_bytes(tensor)
            outside = 0 if spec.role is Role.EMBED else n_layers + 1
            place = outside if spec.layer is None else spec.layer + 1
            replicated = spec.role in (Role.NORM, Role.ROUTER) or spec.name.endswith(_REPLICATED)
            (whole if replicated else divided)[place] += measured[key]
            if spec.name.endswith(_KV_B):
                divided[place] += spec.shape[0] * spec.shape[1] * 2
            if spec.name.endswith(_ROW_PARALLEL):
                group = scheme.group_size if isinstance(scheme, IntScheme) and scheme.group_size else 1
                cuts.setdefault((spec.shape[1], group), spec.name)
        return cls(whole, divided, cuts)

    def on_one_rank(self, tensor_parallel: int) -> list[int]:
        """Bytes of each entry on one tensor-parallel rank."""
        return [whole + -(-cut // tensor_parallel) for whole, cut in zip(self.whole, self.divided, strict=True)]


def _tensor_parallel_problem(weights: _Weights, facts: ModelFacts, size: int) -> str | None:
    """Why the model cannot be cut into ``size`` tensor-parallel ranks, None if it can."""
    if facts.heads % size:
        return f"{facts.heads} attention heads are not divisible by {size}"
    for (in_features, group), name in weights.cuts.items():
        if in_features % size or in_features // size % group:
            return f"{name}: {in_features} inputs over {size} ranks are no multiple of group_size {group}"
    return None


def _layout(weights: _Weights, facts: ModelFacts, tensor_parallel: int, stages: int, context: int) -> Layout:
    first, *layers, last = weights.on_one_rank(tensor_parallel)
    kv_per_layer = facts.kv_bytes_per_token
    partition = partition_layers([nbytes + kv_per_layer * context for nbytes in layers], first, last, stages)
    stops = [sum(partition[: stage + 1]) for stage in range(stages)]
    on_stage = [sum(layers[start:stop]) for start, stop in pairwise([0, *stops])]
    on_stage[0] += first
    on_stage[-1] += last
    runtime = _runtime_bytes(facts, tensor_parallel, context)
    return Layout(tensor_parallel, partition, tuple(on_stage), runtime, kv_per_layer * max(partition), context)


def _runtime_bytes(facts: ModelFacts, tensor_parallel: int, context: int) -> int:
    """Activations at MAX_BATCHED_TOKENS, logits of MAX_SEQS, the MLA decode workspace, CUDA graphs and context."""
    moe_widths = 3 * facts.moe_width // tensor_parallel + facts.hidden
    activations = MAX_BATCHED_TOKENS * facts.top_k * moe_widths * 2
    logits = 2 * MAX_SEQS * facts.vocab * 4
    splits = min(1 << max(0, -(-context // 512) - 1).bit_length(), 216)
    workspace = MAX_SEQS * facts.heads // tensor_parallel * splits * (facts.kv_rank + 1) * 4
    return activations + logits + workspace + GRAPH_BYTES + RUNTIME_BYTES
