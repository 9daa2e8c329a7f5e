"""An evaluation against its baseline: what got worse, beyond noise and beyond what differs from seed to seed.

Enters: evaluation.json's models, then and now, and the losses that the conversions reported. Leaves: one `Check` for
each thing that was looked at. `statistics` says when a number is worse, `places` names layers, experts and linears.
Plain values, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from quantkit.documents.baseline import Baseline, ConversionLosses
from quantkit.documents.evaluation import Candidate, Evaluation
from quantkit.errors import EvaluationError
from quantkit.evaluate.check.baseline import by_name, has_layers, windows_of
from quantkit.evaluate.check.locate import expert_check, layer_check, loss_checks
from quantkit.evaluate.check.statistics import Paired, allowed, of_limit, of_many, paired
from quantkit.evaluate.check.verdict import Check, Limits, Verdict, percent
from quantkit.formats.safetensors.header import printable


@dataclass(frozen=True, slots=True)
class _Sides:
    """A candidate, then and now."""

    name: str
    was: Candidate
    found: Candidate


def check(
    evaluation: Evaluation,
    baseline: Baseline,
    limits: Limits,
    conversions: Mapping[str, ConversionLosses],
    only: Sequence[str] = (),
) -> tuple[Verdict, ...]:
    """A verdict for each candidate of the baseline, or for those in ``only``. Both are of the same text and reference:
    see `check_comparable`.

    Raises `EvaluationError` for a candidate that only one side has: nothing passes unseen.
    """
    old, new = by_name(baseline.evaluation), by_name(evaluation)
    for name in only or {**old, **new}:
        for side, what in ((old, "baseline"), (new, "evaluation")):
            if name not in side:
                raise EvaluationError(
                    f"candidate {printable(name)}: is not in the {what}, which has {printable(', '.join(side))}.",
                    hint="--candidate limits the check to some; --update-baseline takes the evaluation's candidates.",
                )
    return tuple(
        _verdict(
            _Sides(name, old[name], new[name]),
            evaluation.window_domains,
            limits,
            baseline.conversions.get(name),
            conversions.get(name),
        )
        for name in only or old
    )


def _verdict(
    sides: _Sides, domains: Sequence[str], limits: Limits, was: ConversionLosses | None, found: ConversionLosses | None
) -> Verdict:
    old, new = sides.was.result, sides.found.result
    checks = [_size(sides, limits), _kld(sides, limits), *_absolute(sides, limits), _perplexity(sides, limits)]
    checks += _domains(sides, domains, limits)
    notes: list[str] = []
    if has_layers(sides.was) and has_layers(sides.found):
        checks.append(layer_check(windows_of(sides.was), windows_of(sides.found), old.layers, new.layers, limits))
        checks += expert_check(old.layers, new.layers, limits)
    else:
        notes.append("layers and experts were not compared: the reference was read from a file, without hidden states")
    if was is not None and limits.losses:
        found_losses, note = loss_checks(was, found, limits)
        checks += found_losses
        notes += note
    if any(check.better for check in checks):
        notes.append("better than the baseline: --update-baseline keeps it so")
    return Verdict(printable(sides.name), tuple(checks), tuple(notes))


def _size(sides: _Sides, limits: Limits) -> Check:
    was, found = sides.was.model.nbytes, sides.found.model.nbytes
    change = found / was - 1 if was else math.inf
    return Check(
        name="size",
        was=f"{was:,} bytes",
        found=f"{found:,}",
        change=percent(change),
        limit=percent(limits.size_increase),
        passed=change <= limits.size_increase,
    )


def _kld(sides: _Sides, limits: Limits) -> Check:
    pair = paired(windows_of(sides.was).kld, windows_of(sides.found).kld)
    spread = math.hypot(limits.spread * pair.was, limits.divergence_floor)
    return _divergence("mean KLD", pair, allowed(pair, limits.sigmas, spread))


def _divergence(name: str, pair: Paired, limit: float) -> Check:
    return Check(
        name=name,
        was=f"{pair.was:.5f} nats",
        found=f"{pair.found:.5f}",
        change=percent(pair.change / pair.was if pair.was else math.inf if pair.change else 0.0),
        limit=percent(limit / pair.was if pair.was else math.inf),
        passed=pair.change <= limit,
        detail=f"{pair.change:+.5f} ± {pair.standard_error:.5f} nats",
        better=pair.change < -limit,
    )


def _absolute(sides: _Sides, limits: Limits) -> Iterator[Check]:
    was, found = sides.was.result.overall, sides.found.result.overall
    if limits.max_kld is not None:
        yield Check(
            name="mean KLD, absolute",
            was=f"{was.kld.mean:.5f} nats",
            found=f"{found.kld.mean:.5f}",
            limit=f"{limits.max_kld:.5f}",
            passed=found.kld.mean <= limits.max_kld,
        )
    if limits.max_perplexity_increase is not None:
        before, after = (_ratio(scores.log_ratio.mean) for scores in (was, found))
        yield Check(
            name="perplexity above the reference's",
            was=percent(before),
            found=percent(after),
            limit=percent(limits.max_perplexity_increase),
            passed=after <= limits.max_perplexity_increase,
        )


def _perplexity(sides: _Sides, limits: Limits) -> Check:
    ratio = sides.was.result.overall.log_ratio  # its scatter, and not the loss's, which is that of the text
    pair = replace(paired(windows_of(sides.was).loss, windows_of(sides.found).loss), own_error=ratio.standard_error)
    spread = limits.spread * limits.loss_times * abs(sides.was.result.overall.kld.mean)
    limit = allowed(pair, limits.sigmas, math.hypot(spread, limits.divergence_floor))
    before, after = sides.was.result.overall.perplexity.mean, sides.found.result.overall.perplexity.mean
    return Check(
        name="perplexity",
        was=f"{before:.4f}",
        found=f"{after:.4f}",
        change=percent(_ratio(pair.change), 2),
        limit=percent(_ratio(limit), 2),
        passed=pair.change <= limit,
        detail=f"{pair.change:+.5f} ± {pair.standard_error:.5f} nats",
        better=pair.change < -limit,
    )


def _ratio(nats: float) -> float:
    """How much larger a perplexity is whose logarithm is larger by ``nats``."""
    return math.expm1(min(nats, 700.0))


def _domains(sides: _Sides, domains: Sequence[str], limits: Limits) -> Iterator[Check]:
    """The KLD of each domain, if there are several: one line, of the worst."""
    rows: dict[str, list[int]] = {}
    for row, domain in enumerate(domains):
        rows.setdefault(domain, []).append(row)
    if len(rows) < 2:
        return
    was, found = windows_of(sides.was).kld, windows_of(sides.found).kld
    sigmas, whole = of_many(limits.sigmas, len(rows)), sides.was.result.overall.kld.mean
    checks: list[tuple[float, Check]] = []
    for domain, own in rows.items():
        pair = paired(*([values[row] for row in own] for values in (was, found)))
        if pair.windows > 1:
            by_chance = (limits.spread * pair.was, limits.domain_spread * whole, limits.divergence_floor)
            limit = allowed(pair, sigmas, math.hypot(*by_chance))
            checks.append(
                (
                    of_limit(pair.change, limit),
                    replace(_divergence("KLD of a domain", pair, limit), place=printable(domain)),
                )
            )
    checks.sort(key=lambda entry: -entry[0])
    others = [f"{check.place} {check.change}" for _, check in checks[1:] if not check.passed]
    for _, worst in checks[:1]:
        yield replace(worst, detail=f"also {', '.join(others)}") if others else worst
