"""Whether a planned GGUF file fits a set of GPUs under llama.cpp, with the options that spread it over them.

    per GPU:  total >= weights of its layers + KV cache of one full context for them + buffers

Layers go to GPUs in order (--split-mode layer), as --tensor-split says: llama.cpp places layer i of n where
i / (n + 1) falls in its running sums, the head counting as layer n; shares that are whole numbers of layers and sum to
n + 1 therefore place every layer exactly. Embeddings stay in the memory of the host. A model with latent attention
caches keys only, the latent and the rotated part. The cache is in F16. Sources: load_tensors in src/llama-model.cpp and
src/llama-kv-cache.cpp of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from quantkit.arch.base import ModelArch
from quantkit.runtimes.gpus import GIB, Gpus, SizedOutput, check_context, partition_layers
from quantkit.runtimes.llama_cpp import command
from quantkit.tensors import Role

RUNTIME_BYTES = 3 * GIB // 2
"""CUDA context, cuBLAS workspace, and the pool in which quantised matrices are decoded."""
UBATCH = 512
"""Tokens that llama.cpp computes at once by default."""
INPUT_COPIES = 4
"""GGML_SCHED_MAX_COPIES: inputs are kept so often when several GPUs work as a pipeline."""
CACHE_PADDING = 256


@dataclass(frozen=True, slots=True)
class LlamaFit:
    """How the file lies on the GPUs, the fullest as empty as can be. ``layers``, ``weights``: decoder layers and bytes
    of each GPU; ``host_bytes``: embeddings; ``kv_bytes_per_token``: of one layer; ``fixed_bytes``,
    ``mask_bytes_per_token``: what each GPU needs besides."""

    gpus: Gpus
    layers: tuple[int, ...]
    weights: tuple[int, ...]
    host_bytes: int
    kv_bytes_per_token: int
    fixed_bytes: int
    mask_bytes_per_token: int
    context: int

    @property
    def cells(self) -> int:
        """Tokens that the cache has room for."""
        return -(-self.context // CACHE_PADDING) * CACHE_PADDING

    @property
    def buffer_bytes(self) -> int:
        """Allowance of each GPU beside weights and cache."""
        return self.fixed_bytes + self.mask_bytes_per_token * self.cells

    @property
    def kv_bytes(self) -> tuple[int, ...]:
        """Cache of one sequence of full length, of each GPU."""
        return tuple(count * self.kv_bytes_per_token * self.cells for count in self.layers)

    @property
    def needed_bytes(self) -> tuple[int, ...]:
        """Memory that each GPU needs."""
        return tuple(w + kv + self.buffer_bytes for w, kv in zip(self.weights, self.kv_bytes, strict=True))

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU is large enough."""
        return max(self.needed_bytes) <= self.gpus.total_bytes

    @property
    def spare_kv_tokens(self) -> int:
        """Tokens of KV cache, and of attention mask, beyond the one full context; 0 where it does not fit."""
        if not self.fits:
            return 0
        rest = [(self.gpus.total_bytes - needed, n) for needed, n in zip(self.needed_bytes, self.layers, strict=True)]
        return min(free // (n * self.kv_bytes_per_token + self.mask_bytes_per_token) for free, n in rest if n)

    @property
    def tensor_split(self) -> tuple[int, ...]:
        """Shares of --tensor-split: the layers of each GPU, with the head on the last that has any."""
        last = max(place for place, count in enumerate(self.layers) if count)
        return tuple(count + (place == last) for place, count in enumerate(self.layers))

    def options(self) -> str:
        """Options of llama-server besides the file."""
        return command.spread(sum(self.layers), self.context, self.tensor_split)


def fit_llama(plan: SizedOutput, arch: ModelArch, gpus: Gpus, context: int) -> LlamaFit:
    """The layout whose fullest GPU needs least. Raises `PlanError` if the model is not made for ``context`` tokens."""
    sizes = arch.serving()
    check_context(sizes, context)
    embedding, *layers, head = _weights(plan)
    stages = min(gpus.count, len(layers))
    costs = [nbytes + sizes.kv_bytes_per_token * context for nbytes in layers]
    counts = partition_layers(costs, 0, head, stages)
    stops = [sum(counts[: stage + 1]) for stage in range(stages)]
    weights = [sum(layers[start:stop]) for start, stop in pairwise([0, *stops])]
    weights[-1] += head
    empty = (0,) * (gpus.count - stages)
    return LlamaFit(
        gpus=gpus,
        layers=(*counts, *empty),
        weights=(*weights, *empty),
        host_bytes=embedding,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        fixed_bytes=_fixed_bytes(arch),
        mask_bytes_per_token=UBATCH * (4 * (INPUT_COPIES if gpus.count > 1 else 1) + 2),  # F32, and once in F16
        context=context,
    )


def _weights(plan: SizedOutput) -> list[int]:
    """Bytes: [embeddings, layer 0, ..., last layer, final norm and head]. Tied embeddings are loaded twice."""
    specs = {tensor.name: tensor.spec for tensor in plan.planned if tensor.spec is not None}
    n_layers = 1 + max(spec.layer for spec in specs.values() if spec.layer is not None)
    places = [0] * (n_layers + 2)
    measured: dict[tuple[object, ...], int] = {}
    for tensor in plan.planned:
        spec = specs[tensor.name]
        key = (spec.shape, tensor.scheme, tensor.keep_dtype)
        if key not in measured:
            measured[key] = plan.stored_bytes(tensor)
        outside = 0 if spec.role is Role.EMBED else n_layers + 1
        places[outside if spec.layer is None else spec.layer + 1] += measured[key]
    if not any(spec.role is Role.LM_HEAD for spec in specs.values()):
        places[-1] += places[0]
    return places


def _fixed_bytes(arch: ModelArch) -> int:
    """Allowance for a micro-batch: activations of the experts, queries and outputs of attention, logits. With flash
    attention, which llama.cpp takes by itself on GPUs that have it."""
    sizes = arch.serving()
    experts = UBATCH * sizes.top_k * (3 * sizes.expert_width + 2 * arch.hidden_size) * 4
    attention = UBATCH * sizes.heads * (sizes.query_width + sizes.context_width) * 4
    return RUNTIME_BYTES + experts + attention + UBATCH * arch.vocab_size * 4
