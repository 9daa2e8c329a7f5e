"""What every model family states about itself: where its tensors sit and how one layer computes.

A layer is a tuple of *sublayers*; a sublayer is a tuple of *blocks* that read the same residual stream ``x`` and whose
outputs are added to it together (attention; dense MLP; shared expert + routed experts). A block lists its linears in
the order in which data meets them, as *stages*, so that the same description serves calibration (statistics of a stage
are taken after the stage before it was quantised), the reference forward pass and the evaluation of a finished
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from quantkit.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

    Weights = Callable[[str], torch.Tensor]
    """Name -> tensor (out_features, in_features), float32 or bfloat16. Whether it is the original or the quantised one
    is the caller's choice."""


@dataclass(frozen=True, slots=True)
class LinearPart:
    """Part of a linear that some formats store, and so quantise, as a tensor of its own: ``name`` is the linear's with
    a suffix. All parts of a linear together are the linear.

    ``take``: the linear (out, in) -> the part (heads, rows, columns), or (rows, columns) of a part without heads,
    columns being what its inputs run along; ``put(whole, part)`` writes it back in place.
    """

    name: str
    whole: str
    whole_shape: tuple[int, int]
    shape: tuple[int, int, int] | tuple[int, int]
    take: Callable[[torch.Tensor], torch.Tensor]
    put: Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class NormWeight:
    """A norm as what makes a group's inputs: channel i of the inputs is proportional to element i of its weight.

    ``readers``: official names of *all* tensors that read the norm's output, those that are never quantised (a router)
    included. A format's part of a linear is none of them: it is cut from the linear.
    """

    norm: str
    readers: tuple[str, ...]

    @property
    def tensor(self) -> str:
        """Name of the tensor that can absorb factors."""
        return self.norm

    def divided(self, weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The norm's weight (n,) for inputs divided by ``factors`` (n,): new, in the dtype of both."""
        return weight / factors

    def storable(self, factors: torch.Tensor, read: Weights) -> torch.Tensor:
        """The factors next to these (n,) float32 that leave the norm's weight without rounding in the dtype in which
        ``read`` gives it."""
        stored = read(self.norm)
        weight = stored.to(factors.device).float()
        divided = self.divided(weight, factors).to(stored.dtype).float()
        exact = weight / divided
        return exact.where((exact > 0) & exact.isfinite(), factors)


@dataclass(frozen=True, slots=True)
class LinearRows:
    """Rows of an earlier linear as what makes a group's inputs: channel i of the inputs is proportional to them.

    ``rows``: factors (in_features,) of the readers -> (out_features,) of the linear, 1 for rows that the readers don't
    depend on; None where row i is channel i. ``readers``: as in `NormWeight`.
    """

    linear: str
    readers: tuple[str, ...]
    rows: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def tensor(self) -> str:
        """Name of the tensor that can absorb factors."""
        return self.linear

    def divided(self, weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The linear (out, in) for inputs of its readers divided by ``factors`` (n,): new, in the dtype of both."""
        return weight / (factors if self.rows is None else self.rows(factors)).unsqueeze(1)

    def storable(self, factors: torch.Tensor, read: Weights) -> torch.Tensor:
        """The factors as they are: the scales of a quantised linear's rows, or the weights of a kept one, take them."""
        return factors


Producer = NormWeight | LinearRows
"""What can absorb a rescaling of a group's input channels: the model computes the same if the producer is ``divided``
by factors and the columns of all its readers are multiplied with them."""


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears fed by the same tokens: they share one Hessian, one factor and one imatrix row. Names are full tensor
    names (``….weight``), or names of parts beside or instead of the linear that they belong to.

    ``producer``: what makes the inputs; None if nothing can absorb a rescaling of them. Groups of several blocks may
    have the same.
    """

    linears: tuple[str, ...]
    producer: Producer | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Input groups whose inputs are known once the linears of all earlier stages of the block are final.

    ``inputs(weights, x)``: x (rows, tokens, hidden) float32 -> one tensor (rows * tokens, in_features) for each group;
    (heads, rows * tokens, in_features) for a part whose heads read different things. They are float32, or of the dtype
    of the weights that made them.
    It recomputes from ``x`` and calls ``weights`` only for norms and for linears of earlier stages.
    """

    groups: tuple[InputGroup, ...]
    inputs: Callable[[Weights, torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class DenseBlock:
    """A block that every token passes. Its last stage has exactly one group with one linear: the output projection.

    The block's contribution to the residual is ``inputs_of_last_stage @ output_weight.T``.
    """

    name: str
    stages: tuple[Stage, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of every linear, and of every part of one, in the order in which data meets them."""
        return tuple(name for stage in self.stages for group in stage.groups for name in group.linears)

    @property
    def output(self) -> str:
        """Name of the output projection."""
        return self.stages[-1].groups[0].linears[0]


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts a token takes. indices (tokens, top_k) int64, weights (tokens, top_k) float32 (scaled, as
    multiplied onto the expert's output), scores (tokens, experts) float32: the biased selection score, higher = nearer
    to being chosen."""

    indices: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertBlock:
    """Routed experts: gated MLPs of one shape, each seeing only the tokens that the router sends.

    ``inputs(weights, x)``: x (rows, tokens, hidden) -> h (rows * tokens, hidden), what router and experts read.
    ``route(weights, h)``: h (tokens, hidden) -> `Routing`, with the tensor ``router`` (experts, hidden).
    ``activate(gate, up)``: the hidden of an expert from its two projections, e.g. silu(gate) * up.
    ``gates[e]``, ``ups[e]``, ``downs[e]``: tensor names.
    ``producer``: of the inputs of gates and ups. ``down_producers[e]``: of the hidden of expert ``e``; () if nothing
    can absorb a rescaling of it.
    """

    name: str
    inputs: Callable[[Weights, torch.Tensor], torch.Tensor]
    route: Callable[[Weights, torch.Tensor], Routing]
    router: str
    activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gates: tuple[str, ...]
    ups: tuple[str, ...]
    downs: tuple[str, ...]
    producer: Producer | None = None
    down_producers: tuple[Producer, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of every linear, by projection."""
        return (*self.gates, *self.ups, *self.downs)

    @property
    def n_experts(self) -> int:
        """Number of routed experts."""
        return len(self.gates)


Block = DenseBlock | ExpertBlock
Sublayer = tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class MlpNames:
    """How a family calls the linears of a gated MLP, without ``.weight``."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class ServingSizes:
    """What a runtime's memory depends on besides the weights.

    ``heads``: query heads of a layer; ``query_width``: numbers of a head's query as it meets the cache;
    ``context_width``: numbers that a head sums up from the cache. ``kv_bytes_per_token``: of the cache of one layer, in
    16 bits; ``kv_heads``: ranks of tensor parallelism that can share it, 1 if each needs all of it. ``top_k``: routed
    experts that a token takes; ``expert_width``: of their hidden. ``max_positions``: tokens of a sequence that the
    model is made for. ``sparse_top_k``: keys that a query attends to if an indexer chooses them, None if it attends to
    all.
    """

    heads: int
    query_width: int
    context_width: int
    kv_bytes_per_token: int
    kv_heads: int
    top_k: int
    expert_width: int
    max_positions: int
    sparse_top_k: int | None = None


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """What the router of a layer chooses from, for whoever takes experts away. ``count``: routed experts of a layer;
    ``groups``: equal runs of them that the router ranks as wholes, of which ``top_groups`` stay, each by its
    ``ranked_by`` best experts; ``top_k``: experts that a token takes; ``config_key``: entry of config.json (of the
    language model's part of it) that says ``count``."""

    count: int
    groups: int
    top_groups: int
    ranked_by: int
    top_k: int
    config_key: str


@dataclass(frozen=True, slots=True)
class CheckpointVariants:
    """How published checkpoints of a family differ from the tensors that the family lists, without being another model.

    ``derived``: globs of stored buffers whose values follow from config.json. ``copies``: tensor -> the tensor of the
    main model that it repeats, which a checkpoint may leave out. ``tied``: tensor that the family does not list -> the
    one that takes its place; a checkpoint may hold it if both are equal. ``mtp_marker``: ending of a name that only MTP
    layers have, "" if the family has none. ``mtp_own``: endings of what joins an MTP layer to the model; one that is
    there has at least one of them. ``carried``: globs of tensors outside the language model (a vision tower, its
    projector), which are written as they are. ``foreign``: glob -> the architecture that has such tensors, for
    messages.
    """

    derived: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict[str, str])
    tied: Mapping[str, str] = field(default_factory=dict[str, str])
    mtp_marker: str = ""
    mtp_own: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class GgufReading:
    """What llama.cpp runs when it loads a file. ``arch``: the model as it computes it; ``specs``: the tensors that it
    looks for, as wholes or parts; ``notes``: a line for each missing key that changed something."""

    arch: ModelArch
    specs: tuple[TensorSpec, ...]
    notes: tuple[str, ...]


KeyValue = int | float | bool | str | tuple[bool, ...]
"""A value of GGUF metadata: int is stored as uint32, float as float32, a tuple as an array."""


class GgufModel(Protocol):
    """What llama.cpp calls a model and its tensors."""

    @property
    def architecture(self) -> str:
        """Its name there, general.architecture of a file."""
        ...

    def stored_name(self, name: str) -> tuple[str, int | None]:
        """GGUF name of an official tensor or of a part, and the place of a routed expert in its stacked tensor."""
        ...

    def key_values(self, *, mtp: bool) -> dict[str, KeyValue]:
        """Metadata of the architecture. Raises `ConfigError` for a model that llama.cpp cannot run."""
        ...

    def read(self, found: Callable[[str], object]) -> GgufReading:
        """A file of this model, which other converters may have written. ``found``: key -> value, None if it is not
        there. Raises `SourceError` for a key that contradicts the model, or without which llama.cpp refuses the
        file."""
        ...

    def differences(self, *, mtp: bool) -> tuple[str, ...]:
        """What llama.cpp computes slightly otherwise, one line each. ``mtp``: the file holds the MTP layer."""
        ...

    def constants(self) -> Mapping[str, tuple[float, ...]]:
        """Float32 vectors of a file that no checkpoint has, because they follow from config.json, by GGUF name."""
        ...

    def server_flags(self) -> tuple[str, ...]:
        """Words of a command line without which llama.cpp computes this model wrongly, () if it needs none."""
        ...


@dataclass(frozen=True, slots=True)
class MtpLayer:
    """What an MTP layer computes around the decoder layer inside it (`ModelArch.sublayers`), at each position i.

    ``embed``, ``lm_head``: names of its copies of the two vocabulary matrices, which a checkpoint may leave out.
    ``inputs(weights, hidden, embeddings)`` -> what enters the decoder layer; all (rows, tokens, hidden) float32.
    hidden: what `ModelArch.final_hidden` gives at i, *after* the model's final norm: so pass it vLLM 0.33
    (``DeepseekV2Model.forward`` returns it normed), llama.cpp (``h_nextn``) and transformers (``hidden_states[-1]``);
    of the MTP layer before it, if there is one, that one's ``final_hidden``. embeddings: of the token at i + 1 (at
    i + k for the k-th MTP layer).
    ``final_hidden(weights, x)``: x after the decoder layer -> input of its ``lm_head``, which predicts the token
    after that one.
    """

    embed: str
    lm_head: str
    inputs: Callable[[Weights, torch.Tensor, torch.Tensor], torch.Tensor]
    final_hidden: Callable[[Weights, torch.Tensor], torch.Tensor]


class ModelArch(Protocol):
    """One model family bound to one config.json."""

    n_layers: int
    """Decoder layers that the main model runs (MTP layers not counted)."""
    hidden_size: int
    vocab_size: int
    embed: str
    final_norm: str
    lm_head: str
    """Tensor names; ``lm_head == embed`` when the embeddings are tied."""
    longest_exact: int | None
    """Tokens up to which a layer computes from its own inputs alone, so that the description here is the model; None:
    always. Beyond, a layer needs what another layer chose."""
    stacked_experts: bool
    """Whether the official checkpoint stores the experts of a layer as one tensor (experts, out, in)."""

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of an official checkpoint, MTP layers included, in layer order."""
        ...

    def variants(self) -> CheckpointVariants:
        """How published checkpoints differ from `tensors`."""
        ...

    def parts(self) -> Mapping[str, LinearPart]:
        """Parts of linears, by name, that a format may store in place of the whole ones."""
        ...

    def sublayers(self, layer: int) -> tuple[Sublayer, ...]:
        """How decoder layer ``layer`` computes (MTP layers: the decoder layer inside)."""
        ...

    def mtp_layers(self) -> Mapping[int, MtpLayer]:
        """Layers for multi-token prediction by number, in order; {} if the model has none."""
        ...

    def gguf(self) -> GgufModel:
        """The model as llama.cpp sees it."""
        ...

    def serving(self) -> ServingSizes:
        """What the memory of a runtime depends on besides the weights."""
        ...

    def routed_experts(self) -> RoutedExperts | None:
        """The routed experts of each layer that has some; None if no layer has."""
        ...

    def with_experts(self, count: int) -> ModelArch:
        """The same model with so many routed experts in each layer, which the router's groups must divide."""
        ...

    def final_hidden(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) float32 after the last layer -> input of lm_head, float32."""
        ...


ArchFactory = Callable[[Mapping[str, object]], ModelArch]
