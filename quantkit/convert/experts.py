"""Quantise a batch of routed experts: a pure function of their tokens and weights, the unit of work of an expert block.

Moments of what each expert reads, gate and up together, hidden units of the *quantised* gate and up, down. Who computes
which batch changes no byte: the caller applies the results in the order of the experts. A layer's Hessians never all
exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.arch.ops import linear
from quantkit.calibrate.chunk_sizes import EXPERT_CHUNK, at_once
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.inputs import InputMoments, Inputs, shrunk, shrunk_to_diagonal
from quantkit.calibrate.stream import Activate, expert_hidden
from quantkit.convert.folding import alone, rescale_hidden, rescaled_by, with_rescaled
from quantkit.convert.outputs import (
    Importance,
    Linears,
    OutputChoice,
    Quantised,
    any_wanted,
    carried_weights,
    importance_of,
    needs_hessian,
    quantize_linears,
)
from quantkit.plan.phases import KEPT_HIDDEN
from quantkit.quantizers.rescaling import Rescaled


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Tokens of one expert (n,) int64, distinct and rising, and their gate weights (n,) float32. Tokens that are
    borrowed for the statistics alone have weight 0."""

    token: Tensor
    share: Tensor

    def chunks(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, shares) of as many as ``device`` takes at once; nothing for no token."""
        size = at_once(EXPERT_CHUNK, device) if len(self.token) else 0
        return zip(self.token.split(size), self.share.split(size), strict=True) if size else iter(())


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """What B experts read in one stream. ``rows``: the block's inputs of all tokens; ``tokens``: those of each
    expert."""

    rows: RowStore
    tokens: tuple[RoutedTokens, ...]


@dataclass(frozen=True, slots=True)
class ExpertsTask:
    """B experts of one shape, and everything that quantising them depends on. Nothing of it is changed.

    gate, up (B, inter, hidden), down (B, hidden, inter): the source's weights, on the device that computes.
    calibrated: inputs in the stream that methods calibrate on. unquantised: those in the stream of the unquantised
    model, None if no method follows it; its tokens are routed by themselves.
    pooled: moments of the block's inputs over all tokens, towards which those of few tokens are pulled.
    carries_quantised: whether the calibrated stream goes on with what the first output stores.

    ``down.producers``: what makes the hidden units of each expert; methods may rescale these before gate and up are
    quantised.
    """

    gate: Linears
    up: Linears
    down: Linears
    activate: Activate
    outputs: tuple[OutputChoice, ...]
    calibrated: ExpertInputs
    unquantised: ExpertInputs | None
    pooled: Inputs
    carries_quantised: bool

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where everything is computed."""
        return self.gate.weight.device


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to the residual: values (n, hidden), times shares (n,) float32, of distinct rising tokens (n,)
    int64."""

    tokens: Tensor
    values: Tensor
    shares: Tensor


@dataclass(frozen=True, slots=True)
class ExpertOutputs:
    """What B experts add to the residual of one stream, as hidden units and the weights that they meet.

    The products with down are made by `changes`, chunk by chunk: of 13 experts of DeepSeek V3 with 16,384 tokens each
    they have 6 GB in float32, and the hidden units 0.9 GB in bfloat16. ``hidden``: by expert and chunk of its tokens,
    as far as they were kept; None in place of a chunk that is computed again.
    """

    weights: ExpertWeights
    inputs: ExpertInputs
    hidden: tuple[tuple[Tensor | None, ...], ...] = ()

    def changes(self) -> Iterator[Change]:
        """The pieces in the order of the experts, computed when asked for, the same each time."""
        device = self.weights.down.device
        for number, tokens in enumerate(self.inputs.tokens):
            for chunk, (token, share) in enumerate(tokens.chunks(device)):
                hidden = self.hidden[number][chunk] if self.hidden else None
                if hidden is None:
                    hidden = self.weights.hidden(number, self.inputs.rows.gather(token).to(device))
                yield Change(token, linear(hidden, self.weights.down[number]), share)


@dataclass(frozen=True, slots=True)
class ExpertsResult:
    """What quantising a batch of experts gave. ``quantised``: for every output; ``rescaled``: by output, the hidden
    units whose channels its methods rescaled; ``calibrated``, ``unquantised``: what is added to the residual of either
    stream."""

    quantised: tuple[Quantised, ...]
    importance: tuple[Importance, ...]
    rescaled: tuple[tuple[Rescaled, ...], ...]
    calibrated: ExpertOutputs
    unquantised: ExpertOutputs | None


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """What a stream computes with in a batch of experts: gate and up (B, inter, hidden), down (B, hidden, inter)."""

    activate: Activate
    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of all experts."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    def hidden(self, number: int, h: Tensor) -> Tensor:
        """h (tokens, hidden) -> (tokens, inter) of one expert."""
        return expert_hidden(self.activate, self.gate[number], self.up[number], h)


def quantize_experts(task: ExpertsTask) -> ExpertsResult:
    """Quantise gate, up and down of some experts for every output."""
    original = carried = ExpertWeights(task.activate, task.gate.weight, task.up.weight, task.down.weight)
    rescaled = _rescaled_hidden(task, original)
    pairs = zip(task.outputs, rescaled, strict=True)
    task = replace(task, outputs=tuple(with_rescaled(output, more) for output, more in pairs))
    made, importance = _quantize_gate_up(task)
    if task.carries_quantised:
        gate, up = carried_weights(made, (task.gate, task.up))
        carried = replace(carried, gate=gate.to(original.gate.dtype), up=up.to(original.up.dtype))
        del gate, up
    moments = _moments(task, (task.down,)) if any_wanted(task.outputs, task.down.names) else None
    hidden = _hidden(task, carried, original, moments)
    if moments is not None:
        made_down, importance_down = _quantize_down(task, moments.stats())
        made, importance = made + made_down, importance + importance_down
        if task.carries_quantised:
            (down,) = carried_weights(made_down, (task.down,))
            carried = replace(carried, down=down.to(original.down.dtype))
    return ExpertsResult(
        made,
        importance,
        rescaled,
        ExpertOutputs(carried, task.calibrated, hidden),
        None if task.unquantised is None else ExpertOutputs(original, task.unquantised),
    )


def _rescaled_hidden(task: ExpertsTask, original: ExpertWeights) -> tuple[tuple[Rescaled, ...], ...]:
    """Factors for the hidden units, by output, from what they are with unquantised gate and up."""
    if not any(rescaled_by(output, one, alone) for output in task.outputs for one in task.down.producers[:1]):
        return ((),) * len(task.outputs)
    sums = InputMoments(
        task.down.weight.shape[-1], cross=False, device=task.device, matrices=len(task.down.names), full=False
    )
    for number in range(len(task.down.names)):
        for own, _ in _gathered(task, number):
            sums.add(original.hidden(number, own), None, number)
    stats = sums.importance()
    return tuple(rescale_hidden(output, task.down, stats) for output in task.outputs)


_Made = tuple[tuple[Quantised, ...], tuple[Importance, ...]]


def _quantize_gate_up(task: ExpertsTask) -> _Made:
    group = (task.gate, task.up)
    if not any_wanted(task.outputs, (task.gate.names[0], task.up.names[0])):
        return (), ()
    stats = _input_stats(task, group)
    importance = importance_of(task.outputs, group, stats)
    pooled = task.pooled
    return quantize_linears(
        task.outputs, group, stats, lambda own, method: shrunk(own, pooled, method.shrinkage[0])
    ), importance


def _quantize_down(task: ExpertsTask, stats: Inputs) -> _Made:
    importance = importance_of(task.outputs, (task.down,), stats)
    return quantize_linears(
        task.outputs, (task.down,), stats, lambda own, method: shrunk_to_diagonal(own, method.shrinkage[1])
    ), importance


def _input_stats(task: ExpertsTask, group: tuple[Linears, ...]) -> Inputs:
    """Moments of what each expert reads, (B, hidden, hidden)."""
    moments = _moments(task, group)
    for number in range(len(task.calibrated.tokens)):
        for own, unquantised in _gathered(task, number):
            moments.add(own, unquantised, number)
    return moments.stats()


def _moments(task: ExpertsTask, group: tuple[Linears, ...]) -> InputMoments:
    """Empty sums for what linears of these experts read."""
    return InputMoments(
        group[0].weight.shape[-1],
        cross=task.unquantised is not None,
        device=task.device,
        matrices=len(group[0].names),
        full=needs_hessian(task.outputs, tuple(linears.names[0] for linears in group)),
    )


def _gathered(task: ExpertsTask, number: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The block's inputs (n, hidden) of an expert's tokens, chunk by chunk, in the calibrated stream, and of the same
    tokens in the unquantised one."""
    unquantised = task.unquantised
    for token, _ in task.calibrated.tokens[number].chunks(task.device):
        own = task.calibrated.rows.gather(token).to(task.device)
        yield own, None if unquantised is None else unquantised.rows.gather(token).to(task.device)


def _hidden(
    task: ExpertsTask, carried: ExpertWeights, original: ExpertWeights, moments: InputMoments | None
) -> tuple[tuple[Tensor | None, ...], ...]:
    """What each down projection reads in the calibrated stream, as far as there is room for it; adds its moments."""
    found: list[tuple[Tensor | None, ...]] = []
    room = KEPT_HIDDEN * carried.nbytes
    for number in range(len(task.calibrated.tokens)):
        chunks: list[Tensor | None] = []
        for own, unquantised in _gathered(task, number):
            hidden = carried.hidden(number, own)
            room -= hidden.nbytes
            chunks.append(hidden if room >= 0 else None)
            if moments is not None:
                moments.add(hidden, None if unquantised is None else original.hidden(number, unquantised), number)
        found.append(tuple(chunks))
    return tuple(found)
