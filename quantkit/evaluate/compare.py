"""Candidates against their reference, all streamed side by side through the same text.

Weights of one layer (of one expert) at a time for each; hidden states in stores that may lie on disk. After each layer
the candidates' hidden states and choices of experts are compared with the reference's; after the last one
`token_scores` takes the vocabulary in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock, ModelArch
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import embed, forward_layer, row_batches
from quantkit.evaluate.drafts import Draft, DraftScores, same_drafts
from quantkit.evaluate.finite import check_hidden
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
    each layer. ``name``: what messages call it. ``draft``: its first MTP layer, if the checkpoint has one that is to be
    scored.
    """

    weights: Weights
    embed_rows: Callable[[Tensor], Tensor]
    head_rows: Callable[[int, int], Tensor]
    device: torch.device = torch.device("cpu")
    forget: Callable[[], None] = lambda: None
    arch: ModelArch | None = None
    at_border: Callable[[Tensor], Tensor] | None = None
    name: str = "a model"
    draft: Draft | None = None


@dataclass(frozen=True, slots=True)
class LayerScore:
    """A candidate after one layer. ``hidden_error``: root of the mean over tokens of |x' - x|^2 / |x|^2, x being the
    hidden state; ``window_errors``: that mean, not its root, of each window; ``expert_errors``: the root over those
    tokens which the reference sends to each routed expert (NaN: to none), ``expert_tokens`` of them;
    ``router_agreement``: share of the reference's chosen experts that the candidate chose too, None of a
    pruned one, whose numbers mean other experts. Without routed experts the last three are None."""

    layer: int
    hidden_error: float
    router_agreement: float | None
    window_errors: tuple[float, ...] = ()
    expert_tokens: tuple[int, ...] | None = None
    expert_errors: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found of one candidate. ``drafts``: None without an MTP layer."""

    tokens: TokenScores
    layers: tuple[LayerScore, ...]
    drafts: DraftScores | None = None


class Recorder(Protocol):
    """Takes what is to be kept of the reference while it is computed."""

    def routings(self, layer: int, routings: Sequence[Tensor]) -> None:
        """Experts chosen in a layer: indices (tokens, top_k) of each of its blocks."""
        ...

    def logits(self, head: Head, tokens: Tensor, first: int) -> None:
        """The model after its last layer, with tokens (n_rows, length), scored from position ``first`` on."""
        ...


@dataclass(frozen=True, slots=True)
class Stream:
    """A model on its way through the layers."""

    arch: ModelArch
    model: Model
    x: RowStore

    def forward(self, layer: int, scratch: RowStore) -> list[Tensor]:
        """Through a layer, and over its border -> routing indices of its expert blocks. Raises `EvaluationError` if a
        hidden state is not finite after it."""
        model = self.model
        routings = forward_layer(self.arch.sublayers(layer), model.weights, self.x, scratch, model.device)
        self.cross(layer)
        model.forget()
        return routings

    def cross(self, layer: int | None) -> None:
        """Apply `Model.at_border` after ``layer`` (None: the embedding), and refuse what is not finite."""
        if self.model.at_border is not None:
            for start, stop in row_batches(self.x):
                self.x.write(start, self.model.at_border(self.x.read(start, stop)))
        check_hidden(self.model.name, self.arch, self.model.weights, self.x, layer)

    def head(self) -> Head:
        """The model after its last layer."""
        return Head(self.arch, self.model.weights, self.model.head_rows, self.x, self.model.device, self.model.name)

    def drafts(self, tokens: Tensor, scratch: RowStore, first: int) -> Tensor | None:
        """See `same_drafts`; None without an MTP layer. Uses the hidden states up."""
        draft = self.model.draft
        if draft is None:
            return None
        found = same_drafts(self.head(), draft, tokens, scratch, first, partial(self.cross, draft.layer))
        self.model.forget()
        return found


def start_streams(
    arch: ModelArch, models: Sequence[Model], tokens: Tensor, new_rows: NewRows
) -> tuple[list[Stream], RowStore]:
    """Models with the embeddings of tokens (n_rows, length), and a scratch store."""
    n_rows, length = tokens.shape
    streams = [Stream(model.arch or arch, model, new_rows(n_rows, length, arch.hidden_size)) for model in models]
    scratch = new_rows(n_rows, length, arch.hidden_size)
    for stream in streams:
        embed(stream.model.embed_rows, tokens, stream.x)
        stream.cross(None)
    return streams, scratch


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
    recorder: Recorder | None = None,
) -> list[Comparison]:
    """Score candidates on tokens (n_rows, length) int64, predictions at positions ``first_scored`` on. There are two
    stores more than candidates. All models have the reference's number of layers, width and vocabulary. ``recorder``
    hears of the reference. Raises `EvaluationError` for hidden states or losses that are not finite."""
    streams, scratch = start_streams(arch, (reference, *candidates), tokens, new_rows)
    layers = _through(arch.n_layers, streams, scratch, on_layer, recorder)
    heads = [stream.head() for stream in streams]
    if recorder is not None:
        recorder.logits(heads[0], tokens, first_scored)
    scores = token_scores(heads, tokens, first_scored) if candidates else []
    drafts = all_drafts(streams[0], streams[1:], tokens, scratch, first_scored)
    for store in (*(stream.x for stream in streams), scratch):
        store.close()
    return [Comparison(found, tuple(own), drafted) for found, own, drafted in zip(scores, layers, drafts, strict=True)]


def all_drafts(
    reference: Stream | None, candidates: Sequence[Stream], tokens: Tensor, scratch: RowStore, first: int
) -> list[DraftScores | None]:
    """Of each candidate, and of the reference if some candidate has an MTP layer."""
    found = [stream.drafts(tokens, scratch, first) for stream in candidates]
    if all(own is None for own in found):
        return [None] * len(found)
    expected = None if reference is None else reference.drafts(tokens, scratch, first)
    return [None if own is None else DraftScores(expected, own) for own in found]


def compare_layers(
    arch: ModelArch,
    reference: Model,
    candidates: Sequence[Model],
    tokens: Tensor,
    new_rows: NewRows,
    n_layers: int,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[tuple[LayerScore, ...]]:
    """The candidates' scores after each of the first ``n_layers`` layers, on tokens (n_rows, length) int64."""
    streams, scratch = start_streams(arch, (reference, *candidates), tokens, new_rows)
    layers = _through(n_layers, streams, scratch, on_layer, None)
    for store in (*(stream.x for stream in streams), scratch):
        store.close()
    return [tuple(own) for own in layers]


def _through(
    n_layers: int,
    streams: Sequence[Stream],
    scratch: RowStore,
    on_layer: Callable[[int], None],
    recorder: Recorder | None,
) -> list[list[LayerScore]]:
    """Carry every stream through the first layers -> scores of each candidate."""
    layers: list[list[LayerScore]] = [[] for _ in streams[1:]]
    for layer in range(n_layers):
        for found, score in zip(layers, _layer(layer, streams, scratch, recorder), strict=True):
            found.append(score)
        on_layer(layer)
    return layers


def _layer(layer: int, streams: Sequence[Stream], scratch: RowStore, recorder: Recorder | None) -> list[LayerScore]:
    """Carry every stream through a layer, one after the other -> the candidates' scores."""
    scores: list[LayerScore] = []
    expected: list[Tensor] = []
    for number, stream in enumerate(streams):
        routings = stream.forward(layer, scratch)
        if number == 0:
            expected = routings
            if recorder is not None:
                recorder.routings(layer, routings)
        else:
            errors = _token_errors(streams[0].x, stream.x)
            experts = _expert_errors(streams[0].arch, layer, expected, errors)
            same = agreement(expected, routings) if same_experts(streams[0].arch, stream.arch) else None
            windows = errors.mean(1)
            scores.append(LayerScore(layer, float(windows.mean().sqrt()), same, tuple(windows.tolist()), *experts))
    return scores


def _token_errors(reference: RowStore, candidate: RowStore) -> Tensor:
    """|x' - x|^2 / |x|^2 of every token: (n_rows, length) float64 on the CPU."""
    errors: list[Tensor] = []
    for start, stop in row_batches(reference):
        x = reference.read(start, stop)
        moved = (candidate.read(start, stop).to(x.device) - x).square_().sum(-1)
        errors.append((moved / x.square().sum(-1).clamp_min_(torch.finfo(torch.float32).tiny)).double().cpu())
    return torch.cat(errors)


def _expert_errors(
    arch: ModelArch, layer: int, routings: Sequence[Tensor], errors: Tensor
) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """(tokens, root mean error) of each routed expert; (None, None) without a block of them.

    routings: indices (tokens, top_k) of the reference; errors (n_rows, length).
    """
    blocks = [block for sublayer in arch.sublayers(layer) for block in sublayer if isinstance(block, ExpertBlock)]
    if len(blocks) != 1:
        return None, None
    chosen = routings[0].cpu()
    tokens = torch.bincount(chosen.flatten(), minlength=blocks[0].n_experts)
    each = errors.flatten().unsqueeze(-1).expand(chosen.shape).flatten()
    total = torch.bincount(chosen.flatten(), weights=each, minlength=blocks[0].n_experts)
    return tuple(tokens.tolist()), tuple((total / tokens).sqrt().tolist())


def same_experts(reference: ModelArch, candidate: ModelArch) -> bool:
    """Whether the numbers of routed experts mean the same: not in a model that was pruned."""
    ours, theirs = reference.routed_experts(), candidate.routed_experts()
    return ours is None or theirs is None or ours.count == theirs.count


def agreement(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float | None:
    """Routing indices (tokens, top_k) of each block -> share of the expected experts that were found too."""
    if not expected or len(expected) != len(found):
        return None
    shared, chosen = 0, 0
    for ours, theirs in zip(expected, found, strict=True):
        for a, b in zip(ours.split(ROUTED_TOKENS), theirs.split(ROUTED_TOKENS), strict=True):
            shared += int((a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).sum())
        chosen += ours.numel()
    return shared / chosen
