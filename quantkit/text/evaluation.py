"""An evaluation as text for people: tables overall, by domain, by layer, of drafts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantkit.documents.evaluation import Evaluation, Layer, Result, Scores
from quantkit.documents.values import estimate
from quantkit.text.tables import table


def evaluation_text(found: Evaluation) -> str:
    """Tables: overall, by domain, by layer, of MTP drafts; then what was measured on."""
    rows = _named_results(found)
    tables = [_overall(found, rows), _domains(found, rows), _layers(rows), *_drafts(rows)] if rows else []
    return "\n\n".join([*tables, _footer(found)])


def _named_results(found: Evaluation) -> list[tuple[str, float | None, Result]]:
    """(name, bpw, result) of the noise floor and of each candidate; by path where names are the same."""
    models = [candidate.model for candidate in found.candidates]
    names = [model.name for model in models]
    shown = [model.path if names.count(model.name) > 1 else model.name for model in models]
    rows = [
        (name, candidate.model.bpw, candidate.result) for name, candidate in zip(shown, found.candidates, strict=True)
    ]
    floor = [] if found.noise_floor is None else [("bf16 noise floor", None, found.noise_floor.result)]
    return [*floor, *rows]


def _overall(found: Evaluation, rows: Sequence[tuple[str, float | None, Result]]) -> str:
    head = ("model", "bpw", "perplexity", "ln ratio", _kld(found), "median", "90 %", "99 %", "99.9 %", "max")
    head = (*head, "same top", "RMS Δp")
    reference = rows[0][2].overall.reference_perplexity.shown(4)
    first = (found.reference.name, f"{found.reference.bpw:.3f}", reference, *("" for _ in range(9)))
    return table(head, [first, *((name, _bpw(bpw), *_cells(result.overall)) for name, bpw, result in rows)])


def _kld(found: Evaluation) -> str:
    """Head of the column."""
    return "KLD mean" if found.reference_file is None else "KLD mean, at least"


def _bpw(bpw: float | None) -> str:
    return "" if bpw is None else f"{bpw:.3f}"


def _cells(scores: Scores) -> tuple[str, ...]:
    kld, top, change = scores.kld, scores.same_top, scores.rms_probability_change
    quantiles = (f"{value:.5f}" for value in (kld.median, kld.p90, kld.p99, kld.p999, kld.max))
    return (
        scores.perplexity.shown(4),
        scores.log_ratio.shown(5),
        estimate(kld.mean, kld.standard_error, 5),
        *quantiles,
        top.percent(),
        change.percent(),
    )


def _domains(found: Evaluation, rows: Sequence[tuple[str, float | None, Result]]) -> str:
    head = ("domain", "model", "windows", "reference", "perplexity", "ln ratio", _kld(found), "same top")
    cells = [
        (
            domain if number == 0 else "",
            name,
            f"{scores.windows:,}",
            scores.reference_perplexity.shown(3),
            scores.perplexity.shown(3),
            scores.log_ratio.shown(5),
            estimate(scores.kld.mean, scores.kld.standard_error, 5),
            f"{scores.same_top.mean:.2%}",
        )
        for domain in rows[0][2].domains
        for number, (name, _, result) in enumerate(rows)
        for scores in (result.domains[domain],)
    ]
    return table(head, cells, left=2)


def _layers(rows: Sequence[tuple[str, float | None, Result]]) -> str:
    """For each model the relative error of the hidden state and the share of experts that are the same."""
    head = ("layer: error, same experts", *(name for name, _, _ in rows))
    by_layer = zip(*(result.layers for _, _, result in rows), strict=True)
    return table(head, [(str(own[0].layer), *map(_layer, own)) for own in by_layer])


def _layer(layer: Layer) -> str:
    agreement = "" if layer.router_agreement is None else f"{layer.router_agreement:.2%}"
    error = "-" if math.isnan(layer.hidden_error) else f"{layer.hidden_error:.5f}"
    return f"{error} {agreement:>8}"


def _drafts(rows: Sequence[tuple[str, float | None, Result]]) -> list[str]:
    """Where MTP layers draft what their own model chooses; nothing if there are none."""
    found = [(name, result.draft) for name, _, result in rows if result.draft is not None]
    head = ("MTP draft agreement", "original", "checkpoint")
    cells = [
        (name, "" if draft.reference is None else draft.reference.percent(), draft.candidate.percent())
        for name, draft in found
    ]
    return [table(head, cells)] if found else []


def _footer(found: Evaluation) -> str:
    n_windows = sum(text.windows for text in found.text)
    lines = [
        f"{n_windows * found.protocol.scored_per_window:,} tokens scored in {n_windows:,} windows of "
        f"{found.protocol.context:,} ({found.protocol.name}), {len(found.text)} files, on {found.device}. KLD in nats "
        "per token; ± standard error over windows.",
    ]
    if found.reference_file is not None:
        lines += [f"note: the reference is {found.reference_file.path}. KLD: {found.reference_file.kld}"]
        missing = found.reference_file.not_available
        for why in dict.fromkeys(missing.values()):
            lines.append(f"note: no {', '.join(name for name, own in missing.items() if own == why)}: {why}")
    lines += [f"note: {c.model.name}: {note}" for c in found.candidates for note in c.model.notes]
    return "\n".join(lines)
