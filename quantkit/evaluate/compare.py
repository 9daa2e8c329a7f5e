"""Candidates against their reference, all streamed side by side through the same text.

Weights of one layer (of one expert) at a time for each; hidden states in stores that may lie on disk. After each layer
the candidates' hidden states and choices of experts are held against the reference's; after the last one `token_scores`
takes the vocabulary in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.arch.base import ModelArch
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import embed, forward_layer, row_batches
from quantkit.evaluate.token_scores import Head, TokenScores, token_scores

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

NewRows = Callable[[int, int, int], RowStore]
"""(n_rows, length, width) -> a store for hidden states."""
ROUTED_TOKENS = 2**16
"""Tokens whose experts are compared at once."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to run: float32 weights by name, and rows of the two vocabulary matrices.

    ``embed_rows(ids)``: ids (n,) int64 -> (n, hidden); ``head_rows(start, stop)`` -> (stop - start, hidden), all
    float32. ``forget()``: no weight asked for so far is needed again soon. ``arch``: how it computes, None: as the
    reference. ``at_border``: what happens to the hidden states (rows, tokens, hidden) after the embedding and after
    each layer.
    """

    weights: Weights
    embed_rows: Callable[[Tensor], Tensor]
    head_rows: Callable[[int, int], Tensor]
    device: torch.device = torch.device("cpu")
    forget: Callable[[], None] = lambda: None
    arch: ModelArch | None = None
    at_border: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class LayerScore:
    """A candidate behind one layer. ``hidden_error``: root of the mean over tokens of |x' - x|^2 / |x|^2, x being the
    hidden state; ``router_agreement``: share of the reference's chosen experts that the candidate chose too, None for
    a layer without routed experts."""

    layer: int
    hidden_error: float
    router_agreement: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found of one candidate."""

    tokens: TokenScores
    layers: tuple[LayerScore, ...]


@dataclass(frozen=True, slots=True)
class _Stream:
    """A model on its way through the layers."""

    arch: ModelArch
    model: Model
    x: RowStore

    def cross(self) -> None:
        """Apply `Model.at_border`."""
        if self.model.at_border is not None:
            for start, stop in row_batches(self.x):
                self.x.write(start, self.model.at_border(self.x.read(start, stop)))


def compare(
    arch: ModelArch,
    reference: Model,
    candidate: Model,
    tokens: Tensor,
    new_rows: NewRows,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> TokenScores:
    """Score one candidate on every position that predicts a token; see `compare_all`."""
    (found,) = compare_all(arch, reference, (candidate,), tokens, new_rows, on_layer=on_layer)
    return found.tokens


def compare_all(
    arch: ModelArch,
    reference: Model,
    candidates: Sequence[Model],
    tokens: Tensor,
    new_rows: NewRows,
    *,
    first_scored: int = 0,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[Comparison]:
    """Score candidates on tokens (n_rows, length) int64, predictions at positions ``first_scored`` on. There are two
    stores more than candidates. All models have the reference's number of layers, width and vocabulary."""
    n_rows, length = tokens.shape
    streams = [
        _Stream(model.arch or arch, model, new_rows(n_rows, length, arch.hidden_size))
        for model in (reference, *candidates)
    ]
    scratch = new_rows(n_rows, length, arch.hidden_size)
    for stream in streams:
        embed(stream.model.embed_rows, tokens, stream.x)
        stream.cross()
    layers: list[list[LayerScore]] = [[] for _ in candidates]
    for layer in range(arch.n_layers):
        for found, score in zip(layers, _layer(layer, streams, scratch), strict=True):
            found.append(score)
        on_layer(layer)
    heads = [Head(s.arch, s.model.weights, s.model.head_rows, s.x, s.model.device) for s in streams]
    scores = token_scores(heads, tokens, first_scored)
    for store in (*(stream.x for stream in streams), scratch):
        store.close()
    return [Comparison(found, tuple(own)) for found, own in zip(scores, layers, strict=True)]


def _layer(layer: int, streams: Sequence[_Stream], scratch: RowStore) -> list[LayerScore]:
    """Carry every stream through a layer, one after the other -> the candidates' scores."""
    scores: list[LayerScore] = []
    expected: list[Tensor] = []
    for number, stream in enumerate(streams):
        model = stream.model
        routings = forward_layer(stream.arch.sublayers(layer), model.weights, stream.x, scratch, model.device)
        model.forget()
        stream.cross()
        if number == 0:
            expected = routings
        else:
            scores.append(LayerScore(layer, _hidden_error(streams[0].x, stream.x), _agreement(expected, routings)))
    return scores


def _hidden_error(reference: RowStore, candidate: RowStore) -> float:
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    for start, stop in row_batches(reference):
        x = reference.read(start, stop)
        moved = (candidate.read(start, stop).to(x.device) - x).square_().sum(-1)
        total += (moved / x.square().sum(-1).clamp_min_(torch.finfo(torch.float32).tiny)).sum(dtype=torch.float64)
    return float((total / (reference.n_rows * reference.length)).sqrt())


def _agreement(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float | None:
    """Routing indices (tokens, top_k) of each block -> share of the expected experts that were found too."""
    if not expected or len(expected) != len(found):
        return None
    shared, chosen = 0, 0
    for ours, theirs in zip(expected, found, strict=True):
        for a, b in zip(ours.split(ROUTED_TOKENS), theirs.split(ROUTED_TOKENS), strict=True):
            shared += int((a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).sum())
        chosen += ours.numel()
    return shared / chosen
