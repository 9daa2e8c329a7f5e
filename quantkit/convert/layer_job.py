"""What quantising one decoder layer needs, for its dense blocks and its routed experts alike, and who takes the
results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit.arch.base import Block
from quantkit.convert.hidden import Streams
from quantkit.convert.output_hessians import LayerGradients
from quantkit.convert.outputs import Importance, OutputChoice, Quantised
from quantkit.convert.weights import LayerWeights
from quantkit.ranks.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class LayerJob:
    """One layer. ``streams``: the hidden states, None in a data-free conversion. ``experts_at_once``: how many experts
    of one shape are one batch. ``min_expert_tokens``: experts with fewer tokens borrow those that came nearest to
    choosing them, for the statistics only. ``gradients``: of the model's loss at the outputs of the layer's linears,
    None if no method asks for them or nothing is known of this layer. ``fits_routers``: whether routers are moved by
    least squares (`quantkit.convert.routers`). ``ranks``: those that share the layer; each has its own rows in
    ``streams``, and hands its sink what it quantised itself."""

    outputs: tuple[OutputChoice, ...]
    weights: LayerWeights
    streams: Streams | None
    experts_at_once: int
    min_expert_tokens: int
    gradients: LayerGradients | None = None
    fits_routers: bool = False
    ranks: Ranks = ALONE

    @property
    def device(self) -> torch.device:
        """What computes."""
        return self.weights.device

    @property
    def hidden(self) -> Streams:
        """The streams of a calibrated layer."""
        assert self.streams is not None, "a data-free layer has no hidden states"
        return self.streams


class LayerSink(Protocol):
    """Takes the results of one layer in the order of its tensors."""

    def begin(self, block: str, total: int) -> None:
        """A block begins, of which the first output will be given so many tensors."""
        ...

    def write(self, made: Quantised) -> None:
        """What one output stores of some linears. May return before it is written."""
        ...

    def write_importance(self, importance: Importance) -> None:
        """What the inputs of a linear are, for the outputs that keep it."""
        ...


def begin_block(job: LayerJob, sink: LayerSink, block: Block) -> None:
    """Tell a sink that a block begins, of which this rank quantises its share."""
    total = sum(name in job.outputs[0].methods for name in block.linears)
    sink.begin(block.name, -(-total // job.ranks.count))


def hand_over(sink: LayerSink, quantised: Iterable[Quantised], importance: Iterable[Importance]) -> None:
    """Give a sink what some linears became."""
    for one in importance:
        sink.write_importance(one)
    for made in quantised:
        sink.write(made)
