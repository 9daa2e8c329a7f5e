"""Evaluations made of random numbers, as `quantkit evaluate` would write them: text noise that all conversions share,
noise of their own, and bugs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantkit.documents.evaluation import (
    CheckpointFacts,
    Divergence,
    Evaluation,
    Layer,
    Result,
    Scores,
    ScoringProtocol,
    Windows,
)
from quantkit.documents.values import Mean

DOMAINS = ("code",) * 24 + ("prose",) * 24
N_LAYERS, N_EXPERTS = 3, 12


@dataclass(frozen=True)
class Made:
    """A conversion. Factors on the mean KLD, on windows of one domain, on the squared errors from a layer on, and on
    the error of (layer, expert)."""

    seed: int = 0
    kld: float = 1.0
    domains: dict[str, float] = field(default_factory=dict)
    layer: tuple[int, float] = (0, 1.0)
    experts: dict[tuple[int, int], float] = field(default_factory=dict)
    nbytes: int = 1_000_000
    name: str = "int4"
    path: str = "out/int4"


def evaluation(*conversions: Made, **changes: object) -> Evaluation:
    """``changes``: of the document's fields."""
    document = Evaluation(
        versions={"quantkit": "0"},
        device="cpu",
        arithmetic="float32",
        protocol=ScoringProtocol(
            name="windows", description="", context=128, max_windows_per_file=None, scored_per_window=127
        ),
        text=(),
        tokens_sha256="aa" * 32,
        reference=facts("model", "model", "11" * 32),
        noise_floor=None,
        candidates=tuple(candidate(made) for made in conversions),  # pyright: ignore[reportArgumentType]
        window_domains=DOMAINS,
    )
    return document.model_copy(update=changes)


def facts(name: str, path: str, fingerprint: str = "", nbytes: int = 1_000_000) -> CheckpointFacts:
    return CheckpointFacts(
        name=name, path=path, format="BF16", fingerprint=fingerprint, weights=2 * nbytes, nbytes=nbytes, notes=()
    )


def candidate(made: Made) -> dict[str, object]:
    return {"model": facts(made.name, made.path, nbytes=made.nbytes), "result": result(made)}


def result(made: Made) -> Result:
    text, own = np.random.default_rng(99), np.random.default_rng(made.seed)
    n = len(DOMAINS)
    hard = np.exp(0.5 * text.standard_normal(n))
    luck = 1 + 0.01 * own.standard_normal()
    by_domain = np.array([made.domains.get(domain, 1.0) for domain in DOMAINS])
    kld = 0.015 * made.kld * luck * by_domain * hard * (1 + 0.1 * own.standard_normal(n))
    reference = 2 + text.standard_normal(n) * 0.5
    loss = reference + kld + 0.004 * own.standard_normal(n)
    layers = [layer_windows(made, layer, text.standard_normal(n), own) for layer in range(N_LAYERS)]
    scores = Scores(
        windows=n,
        tokens=127 * n,
        reference_perplexity=Mean(mean=float(np.exp(reference.mean())), standard_error=0.1),
        perplexity=Mean(mean=float(np.exp(loss.mean())), standard_error=0.1),
        log_ratio=mean(loss - reference),
        kld=Divergence(
            **mean(kld).model_dump(), median=0.01, p90=0.03, p99=0.1, p999=0.3, max=float(kld.max())
        ),
        same_top=Mean(mean=0.9, standard_error=0.01),
        rms_probability_change=Mean(mean=0.03, standard_error=0.001),
    )  # fmt: skip
    errors = [expert_errors(made, layer, own) for layer in range(N_LAYERS)]
    return Result(
        overall=scores,
        domains={},
        layers=tuple(
            Layer(
                layer=layer,
                hidden_error=float(np.sqrt(windows.mean())),
                router_agreement=0.97 if layer else None,
                expert_tokens=(8000,) * N_EXPERTS if layer else None,
                expert_errors=tuple(errors[layer]) if layer else None,
            )
            for layer, windows in enumerate(layers)
        ),
        windows=Windows(
            loss=tuple(loss), kld=tuple(kld), same_top=(0.9,) * n, layers=tuple(tuple(own) for own in layers)
        ),
    )


def mean(values: np.ndarray) -> Mean:
    return Mean(mean=float(values.mean()), standard_error=float(values.std(ddof=1) / len(values) ** 0.5))


def layer_windows(made: Made, layer: int, hard: np.ndarray, own: np.random.Generator) -> np.ndarray:
    first, factor = made.layer
    size = 0.005 * (layer + 1) * (factor if layer >= first else 1.0)
    return size * (1 + 0.01 * own.standard_normal()) * np.exp(0.3 * hard) * (1 + 0.05 * own.standard_normal(len(hard)))


def expert_errors(made: Made, layer: int, own: np.random.Generator) -> list[float]:
    return [
        0.07 * (1 + 0.008 * float(own.standard_normal())) * made.experts.get((layer, expert), 1.0)
        for expert in range(N_EXPERTS)
    ]


def write(path: Path, *conversions: Made, **changes: object) -> Path:
    """The file."""
    path.write_text(evaluation(*conversions, **changes).to_json(), encoding="utf-8")
    return path
