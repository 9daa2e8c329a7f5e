"""What every model family states about itself: where its tensors sit and how one layer computes.

A layer is a tuple of *sublayers*; a sublayer is a tuple of *blocks* that read the same residual stream ``x`` and whose
outputs are added to it together (attention; dense MLP; shared expert + routed experts). A block lists its linears in
the order in which data meets them, as *stages*, so that the same description serves calibration (statistics of a stage
are taken after the stage before it was quantised), the reference forward pass and the evaluation of a finished
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    Weights = Callable[[str], torch.Tensor]
    """Name -> float32 tensor (out_features, in_features). Whether it is the original or the quantised one is the
    caller's choice."""


class Role(str, Enum):
    """What a tensor is for; recipes match on it."""

    EMBED = "embed"
    NORM = "norm"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ROUTER = "router"
    LM_HEAD = "lm_head"
    MTP = "mtp"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a checkpoint of this family must hold. ``layer`` is None outside the decoder layers; ``expert``
    is the routed expert's number. ``linear`` marks the 2-D weights that a recipe may quantise. ``float32`` marks what
    the official release stores in F32."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None
    linear: bool = False
    float32: bool = False


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears fed by the same tokens: they share one Hessian, one factor and one imatrix row. Names are full tensor
    names (``….weight``)."""

    linears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Input groups whose inputs are known once the linears of all earlier stages of the block are final.

    ``inputs(weights, x)``: x (rows, tokens, hidden) float32 -> one tensor (rows * tokens, in_features) float32 for each
    group.
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
    ``route(weights, h)``: h (tokens, hidden) float32 -> `Routing`.
    ``activate(gate, up)``: the hidden of an expert from its two projections, e.g. silu(gate) * up.
    ``gates[e]``, ``ups[e]``, ``downs[e]``: tensor names.
    """

    name: str
    inputs: Callable[[Weights, torch.Tensor], torch.Tensor]
    route: Callable[[Weights, torch.Tensor], Routing]
    activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gates: tuple[str, ...]
    ups: tuple[str, ...]
    downs: tuple[str, ...]

    @property
    def n_experts(self) -> int:
        """Number of routed experts."""
        return len(self.gates)


Block = DenseBlock | ExpertBlock
Sublayer = tuple[Block, ...]


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

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of an official checkpoint, MTP layers included, in layer order."""
        ...

    def sublayers(self, layer: int) -> tuple[Sublayer, ...]:
        """How decoder layer ``layer`` computes (MTP layers: the decoder layer inside)."""
        ...

    def final_hidden(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) float32 after the last layer -> input of lm_head, float32."""
        ...


ArchFactory = Callable[[Mapping[str, object]], ModelArch]
