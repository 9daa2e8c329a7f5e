"""Whether a planned checkpoint fits a set of GPUs under vLLM, with the command that serves it.

    per GPU:  utilisation * total >= weights + activations + CUDA graphs + KV cache of one full context

Rules from vLLM's source (0.24 and 0.33): norms, routers and what the family says are replicated under tensor
parallelism; the two halves of DeepSeek's kv_b are kept once more in BF16; the KV cache is divided under pipeline
parallelism, under tensor parallelism only if it has heads (a latent has none).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from quantkit.arch.base import ModelArch, ServingSizes
from quantkit.runtimes.gpus import GIB, Gpus, SizedOutput, check_context, partition_layers
from quantkit.runtimes.vllm.command import MAX_BATCHED_TOKENS, MAX_SEQS, serve_spread
from quantkit.runtimes.vllm.contract import SPARSE_CAPABILITY, SPARSE_NEEDS
from quantkit.runtimes.vllm.tensor_parallel import Cuts, cut_problem, cuts_of
from quantkit.tensors import Projection, Role, TensorSpec

UTILIZATIONS = (0.92, 0.95)
"""vLLM's default, and what a machine that does nothing else can give."""
RUNTIME_BYTES = GIB
"""CUDA context, NCCL buffers, allocator rounding."""
GRAPH_BYTES = GIB


@dataclass(frozen=True, slots=True)
class Placement:
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
    """The verdict. ``utilization``: the smallest of vLLM's settings that is enough; None: does not fit. ``placement``:
    None if none is legal."""

    gpus: Gpus
    placement: Placement | None
    utilization: float | None
    refused: tuple[str, ...]

    @property
    def spare_kv_tokens(self) -> int:
        """Tokens of KV cache beyond the one full context."""
        if self.placement is None or self.utilization is None:
            return 0
        free = round(self.utilization * self.gpus.total_bytes) - self.placement.needed_bytes
        return free // self.placement.kv_bytes_per_token

    def command(self, out: str) -> str:
        """The vLLM command for this placement."""
        assert self.placement is not None
        assert self.utilization is not None
        placement = self.placement
        return serve_spread(out, placement.tensor_parallel, placement.partition, placement.context, self.utilization)


def fit(plan: SizedOutput, arch: ModelArch, gpus: Gpus, context: int) -> Fit:
    """The first placement that fits, tensor parallelism preferred; else the one that comes nearest, with
    ``utilization`` None. Raises `PlanError` if the model is not made for ``context`` tokens.
    """
    sizes, n_layers = arch.serving(), arch.n_layers
    check_context(sizes, context)
    if sizes.sparse_top_k is not None and (gpus.capability or SPARSE_CAPABILITY) < SPARSE_CAPABILITY:
        return Fit(gpus, None, None, (f"{gpus.name}: {SPARSE_NEEDS}",))
    weights = _Weights.of(plan, n_layers)
    refused: list[str] = []
    placements: list[Placement] = []
    for tensor_parallel in sorted((n for n in range(1, gpus.count + 1) if gpus.count % n == 0), reverse=True):
        stages = gpus.count // tensor_parallel
        problem = cut_problem(weights.cuts, sizes.heads, tensor_parallel, sizes.kv_heads)
        if problem is None and stages > n_layers:
            problem = f"{stages} pipeline stages for {n_layers} layers"
        if problem is not None:
            refused.append(f"TP={tensor_parallel} PP={stages}: {problem}")
            continue
        placements.append(_place(weights, arch, tensor_parallel, stages, context))
    for utilization in UTILIZATIONS:
        for placement in placements:
            if placement.needed_bytes <= utilization * gpus.total_bytes:
                return Fit(gpus, placement, utilization, tuple(refused))
    nearest = min(placements, key=lambda placement: placement.needed_bytes, default=None)
    return Fit(gpus, nearest, None, tuple(refused))


@dataclass(frozen=True, slots=True)
class _Weights:
    """Bytes after loading, MTP left out: [first stage's embedding, layer 0, ..., last layer, final norm and head].
    ``whole`` is on every tensor-parallel rank, ``divided`` is cut. ``cuts``: of its row-parallel linears."""

    whole: list[int]
    divided: list[int]
    cuts: Cuts

    @classmethod
    def of(cls, plan: SizedOutput, n_layers: int) -> _Weights:
        whole, divided = [0] * (n_layers + 2), [0] * (n_layers + 2)
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
            (whole if _is_replicated(spec) else divided)[place] += measured[key]
            if spec.projection is Projection.KV_B:
                divided[place] += spec.shape[0] * spec.shape[1] * 2
        return cls(whole, divided, cuts_of(tensor for tensor in plan.planned if tensor.role is not Role.MTP))

    def on_one_rank(self, tensor_parallel: int) -> list[int]:
        """Bytes of each entry on one tensor-parallel rank."""
        return [whole + -(-cut // tensor_parallel) for whole, cut in zip(self.whole, self.divided, strict=True)]


def _is_replicated(spec: TensorSpec) -> bool:
    return spec.replicated or spec.role in (Role.NORM, Role.ROUTER)


def _place(weights: _Weights, arch: ModelArch, tensor_parallel: int, stages: int, context: int) -> Placement:
    first, *layers, last = weights.on_one_rank(tensor_parallel)
    sizes = arch.serving()
    kv_per_layer = -(-sizes.kv_bytes_per_token // min(tensor_parallel, sizes.kv_heads))
    partition = partition_layers([nbytes + kv_per_layer * context for nbytes in layers], first, last, stages)
    stops = [sum(partition[: stage + 1]) for stage in range(stages)]
    on_stage = [sum(layers[start:stop]) for start, stop in pairwise([0, *stops])]
    on_stage[0] += first
    on_stage[-1] += last
    runtime = _runtime_bytes(sizes, arch.hidden_size, arch.vocab_size, tensor_parallel, context)
    return Placement(tensor_parallel, partition, tuple(on_stage), runtime, kv_per_layer * max(partition), context)


def _runtime_bytes(sizes: ServingSizes, hidden: int, vocab: int, tensor_parallel: int, context: int) -> int:
    """Activations at MAX_BATCHED_TOKENS, logits of MAX_SEQS, the decode workspace of attention, CUDA graphs and
    context."""
    moe_widths = 3 * sizes.expert_width // tensor_parallel + hidden
    activations = MAX_BATCHED_TOKENS * sizes.top_k * moe_widths * 2
    logits = 2 * MAX_SEQS * vocab * 4
    splits = min(1 << max(0, -(-context // 512) - 1).bit_length(), 216)
    workspace = MAX_SEQS * sizes.heads // tensor_parallel * splits * (sizes.context_width + 1) * 4
    return activations + logits + workspace + GRAPH_BYTES + RUNTIME_BYTES
