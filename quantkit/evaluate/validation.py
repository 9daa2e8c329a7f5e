"""A checkpoint as `compare` runs it, as it is or rounded to bfloat16, and the scores of its tokens as means with
standard errors."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.arch.base import ModelArch
from quantkit.calibrate.weight_cache import WeightCache
from quantkit.documents.conversion import ValidationScores
from quantkit.documents.values import Mean
from quantkit.evaluate.compare import Model
from quantkit.evaluate.drafts import Draft, DraftScores
from quantkit.evaluate.statistics import drafts_of
from quantkit.evaluate.token_scores import TokenScores
from quantkit.tensors import RowSource


def model_of(
    arch: ModelArch, source: RowSource, device: torch.device, cache_bytes: int, *, name: str = "a model"
) -> Model:
    """A source as `compare` runs it: by ``arch``, float32 on ``device``, read when asked for, the latest weights of a
    layer kept up to ``cache_bytes``. ``name``: what messages call it."""
    weights = WeightCache(lambda name: source.read(name).to(device).float(), cache_bytes)
    return Model(
        weights=weights,
        embed_rows=lambda ids: source.read_rows(arch.embed, ids.tolist()).float(),
        head_rows=lambda start, stop: source.read(arch.lm_head, (start, stop)).to(device).float(),
        device=device,
        forget=weights.forget,
        arch=arch,
        name=name,
    )


def scored_model(
    arch: ModelArch, source: RowSource, device: torch.device, cache_bytes: int, name: str = "a model"
) -> Model:
    """`model_of`, with the first MTP layer if ``source`` has all of it. Where it lacks its copies of the vocabulary's
    matrices, the model's serve, as in runtimes."""
    return replace(model_of(arch, source, device, cache_bytes, name=name), draft=_draft_of(arch, source, device))


def _draft_of(arch: ModelArch, source: RowSource, device: torch.device) -> Draft | None:
    layers = arch.mtp_layers()
    if not layers:
        return None
    infos, copies, first = source.infos(), arch.variants().copies, min(layers)
    if any(spec.name not in infos for spec in arch.tensors() if spec.layer == first and spec.name not in copies):
        return None
    own = layers[first]
    embed = own.embed if own.embed in infos else arch.embed
    head = own.lm_head if own.lm_head in infos else arch.lm_head
    return Draft(
        first,
        embed_rows=lambda ids: source.read_rows(embed, ids.tolist()).float(),
        head_rows=lambda start, stop: source.read(head, (start, stop)).to(device).float(),
    )


BF16_ROUNDING = (
    "Rounded to bfloat16 (ties to even): every weight but those that the family's official release stores in float32 "
    "(the router's selection bias), and the hidden states after the embedding and after each decoder layer. "
    "Arithmetic inside a layer, the final norm and the logits stay float32."
)
"""What `rounded_to_bf16` does."""


def rounded_to_bf16(arch: ModelArch, model: Model) -> Model:
    """The model with weights and hidden states at layer borders in bfloat16: see `BF16_ROUNDING`."""
    exact = {spec.name for spec in arch.tensors() if spec.float32}

    def weights(name: str) -> Tensor:
        return model.weights(name) if name in exact else _bf16(model.weights(name))

    def embed_rows(ids: Tensor) -> Tensor:
        return _bf16(model.embed_rows(ids))

    def head_rows(start: int, stop: int) -> Tensor:
        return _bf16(model.head_rows(start, stop))

    draft = model.draft
    if draft is not None:
        draft = Draft(
            draft.layer,
            embed_rows=lambda ids, rows=draft.embed_rows: _bf16(rows(ids)),
            head_rows=lambda start, stop, rows=draft.head_rows: _bf16(rows(start, stop)),
        )
    name = f"{model.name} rounded to bfloat16"
    rounded = replace(model, weights=weights, embed_rows=embed_rows, head_rows=head_rows, at_border=_bf16)
    return replace(rounded, name=name, draft=draft)


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def summarise(scores: TokenScores, drafts: DraftScores | None = None) -> ValidationScores:
    """Means over tokens with standard errors over windows (rows)."""
    reference, candidate = scores.reference_nll.mean(1), scores.candidate_nll.mean(1)
    kld = scores.kld.flatten()
    return ValidationScores(
        windows=len(reference),
        tokens=scores.kld.numel(),
        reference_perplexity=_exp(_mean(reference)),
        candidate_perplexity=_exp(_mean(candidate)),
        perplexity_ratio=_exp(_mean(candidate - reference)),
        mean_kl=_mean(scores.kld.mean(1)),
        median_kl=float(kld.median()),
        p99_kl=float(kld.sort().values[min(len(kld) - 1, int(0.99 * len(kld)))]),
        top1=_mean(scores.same_top.double().mean(1)),
        draft=drafts_of(drafts),
    )


def _mean(values: Tensor) -> Mean:
    """Mean and standard error of the windows' means."""
    n = len(values)
    error = float(values.std() / math.sqrt(n)) if n > 1 else math.nan
    return Mean(mean=float(values.mean()), standard_error=error)


def _exp(loss: Mean) -> Mean:
    mean = math.inf if loss.mean > 709 else math.exp(loss.mean)  # which would raise
    return Mean(mean=mean, standard_error=mean * loss.standard_error)
