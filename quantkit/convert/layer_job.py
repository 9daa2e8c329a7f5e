"""What quantising one decoder layer needs, in one place for its dense blocks and its routed experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputImportance
from quantkit.convert.hidden import Streams
from quantkit.convert.outputs import Deliver, OutputJob
from quantkit.convert.weights import LayerWeights


@dataclass(slots=True)
class ExpertCounts:
    """What the router gave an expert: tokens, the sum of their gate weights, and tokens borrowed because there were too
    few."""

    n_tokens: int
    gate_weight: float
    borrowed: int = 0


@dataclass(frozen=True, slots=True)
class LayerJob:
    """Everything one layer needs. ``new_rows(width)`` makes a scratch store for all tokens, in memory or on disk.

    ``min_expert_tokens``: experts with fewer tokens borrow those that came nearest to choosing them, for the statistics
    only.
    ``deliver``: takes what was made to the sinks, now or later.
    ``expect(names)``: hears which weights of routed experts will be read next.
    ``streams`` is None in a data-free conversion. ``experts_at_once``: how many experts of one shape are one batch.
    ``importance(names)``: what an imatrix file knows of the inputs of linears of one shape, on the device, for
    conversions without streams.
    """

    outputs: tuple[OutputJob, ...]
    weights: LayerWeights
    streams: Streams | None
    new_rows: Callable[[int], RowStore]
    deliver: Deliver
    on_stage: Callable[[str, int], None]
    device: torch.device
    experts_at_once: int
    min_expert_tokens: int
    expect: Callable[[list[str]], None] = lambda names: None
    importance: Callable[[tuple[str, ...]], InputImportance | None] = lambda names: None
    counts: dict[str, list[ExpertCounts]] = field(default_factory=dict[str, list[ExpertCounts]])

    @property
    def hidden(self) -> Streams:
        """The streams of a calibrated layer."""
        assert self.streams is not None, "a data-free layer has no hidden states"
        return self.streams
