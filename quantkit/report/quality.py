"""Sections about scores: all checkpoints side by side, how KLD is spread over tokens, domains and layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.documents.evaluation import HISTOGRAM_EDGES, Divergence, Layer, Result, Scores
from quantkit.documents.values import DraftAgreement, Mean
from quantkit.report import figures, numbers
from quantkit.report.contents import Block, Figure, Note, Section, Table
from quantkit.report.pareto import pareto
from quantkit.report.scored import LabelledEvaluation, Score, ScoredCheckpoint, ScoredCheckpoints, front

FLOOR = "noise floor"


def comparison(found: ScoredCheckpoints) -> Section:
    """Every checkpoint in a table, and size against KLD for those that can be compared."""
    groups = comparable(found.checkpoints)
    best = {id(checkpoint) for group in groups for checkpoint in front(group)}
    blocks: list[Block] = [_overview(found, best)]
    if len(groups) > 1:
        blocks.append(
            Note(
                "These scores were measured on different text, or against different references, or against a reference "
                "and a file of its statistics: compare only numbers of one plot with each other.",
                warning=True,
            )
        )
    for group in groups:
        blocks += [*([_pareto(group, _floor(found, group))] if len(group) > 1 else []), _both_ends(group)]
    return Section("comparison", "Size against quality", tuple(blocks))


def _both_ends(group: Sequence[ScoredCheckpoint]) -> Note:
    """The checkpoint closest to the original and the one furthest from it, in words."""
    ordered = sorted(group, key=lambda one: one.score.kld.mean if one.score else math.inf)
    return Note(" ".join(dict.fromkeys(in_practice(one) for one in (ordered[0], ordered[-1]))))


def comparable(checkpoints: Sequence[ScoredCheckpoint]) -> tuple[tuple[ScoredCheckpoint, ...], ...]:
    """Scored checkpoints, those of the same text and reference together."""
    groups: dict[str, list[ScoredCheckpoint]] = {}
    for checkpoint in checkpoints:
        if checkpoint.score is not None:
            groups.setdefault(checkpoint.score.text, []).append(checkpoint)
    return tuple(tuple(group) for group in groups.values())


def _floor(found: ScoredCheckpoints, group: Sequence[ScoredCheckpoint]) -> float | None:
    """Mean KLD of the noise floor that was measured with a group."""
    for evaluated in found.evaluations:
        floor = evaluated.document.noise_floor
        inside = any(one.result is c.result for one in group for c in evaluated.document.candidates)
        if inside and floor is not None:
            return floor.result.overall.kld.mean
    return None


def _overview(found: ScoredCheckpoints, best: set[int]) -> Table:
    head = ("checkpoint", "size", "bits per weight", "mean KLD", "perplexity", "its change", "same top token", "best")
    rows: list[tuple[str, ...]] = []
    references: dict[str, tuple[str, ...]] = {}
    for evaluated in found.evaluations:
        model = evaluated.document.reference
        ppl = [c.result.overall.reference_perplexity for c in evaluated.document.candidates[:1]]
        shown = numbers.estimate(ppl[0]) if ppl else "-"
        row = (f"{model.name} (reference)", numbers.size(model.nbytes), f"{model.bpw:.3f}", "0", shown, "", "", "")
        references.setdefault(str(row), row)
    for checkpoint in found.checkpoints:
        mark = "●" if id(checkpoint) in best else ""
        cells = ("-", "-", "-", "-") if checkpoint.score is None else scores_cells(checkpoint)
        rows.append((checkpoint.label, numbers.size(checkpoint.nbytes), f"{checkpoint.bpw:.3f}", *cells, mark))
    return Table(head, (*references.values(), *rows))


def scores_cells(checkpoint: ScoredCheckpoint) -> tuple[str, str, str, str]:
    """KLD, perplexity, its relative change, same top token."""
    score = checkpoint.score
    assert score is not None
    return (
        kld_text(score),
        numbers.estimate(score.perplexity),
        numbers.percentage_estimate(change(score.log_ratio), signed=True),
        numbers.percentage_estimate(score.same_top),
    )


def kld_text(score: Score) -> str:
    """ "0.0143 ± 0.0011", with a sign in front if the true one is larger."""
    return f"{'≥ ' if score.lower_bound else ''}{numbers.estimate(score.kld)}"


def change(log_ratio: Mean) -> Mean:
    """Relative change of perplexity of a difference of losses, its error by the delta method."""
    if not math.isfinite(log_ratio.mean) or log_ratio.mean > 700:
        return Mean(mean=math.inf if log_ratio.mean > 0 else math.nan, standard_error=math.nan)
    ratio = math.exp(log_ratio.mean)
    return Mean(mean=math.expm1(log_ratio.mean), standard_error=ratio * log_ratio.standard_error)


def in_practice(checkpoint: ScoredCheckpoint) -> str:
    """What a mean KLD means, by the same measurement: how often the most likely token stays the same, and what becomes
    of perplexity. "" where nothing was measured."""
    score = checkpoint.score
    if score is None:
        return ""
    perplexity = Mean(mean=1 + change(score.log_ratio).mean, standard_error=change(score.log_ratio).standard_error)
    halves = [numbers.number(kld) for share, kld in score.quantiles if share == 0.5]
    return (
        f"In practice, {checkpoint.label}: with a mean KLD of {kld_text(score)} nats the most likely token is the "
        f"original's in {numbers.number(100 * score.same_top.mean)} % of all places, and perplexity is "
        f"{numbers.estimate(perplexity)} times the original's. Half of the tokens have a KLD below {halves[0]}."
        f"{_drafts(score.draft)}"
    )


def _drafts(draft: DraftAgreement | None) -> str:
    """A sentence about the MTP layer, "" without one."""
    if draft is None:
        return ""
    own = numbers.percentage_estimate(draft.candidate)
    original = "" if draft.reference is None else f", the original's at {numbers.percentage_estimate(draft.reference)}"
    return f" Its MTP layer drafts the token that it chooses itself at {own} of all places{original}."


def _pareto(group: Sequence[ScoredCheckpoint], floor: float | None) -> Figure:
    best = front(group)
    rows = tuple(
        (one.label, numbers.size(one.nbytes), f"{one.bpw:.3f}", kld_text(one.score), "yes" if one in best else "no")
        for one in sorted(group, key=lambda checkpoint: checkpoint.nbytes)
        if one.score is not None
    )
    names = ", ".join(one.label for one in best)
    return Figure(
        title="Size against KL divergence",
        how="Further left is smaller, further down is closer to the original. The line joins the checkpoints that no "
        "other beats in both; bars are one standard error. Differences smaller than the noise floor mean nothing. "
        "Names without room are in the table.",
        alt=f"Scatter plot of {numbers.counted(len(group), 'checkpoint')}, size against mean KL divergence. "
        f"On the front, from small to large: {names}.",
        spec=pareto(group, best, floor),
        table=Table(("checkpoint", "size", "bits per weight", "mean KLD", "on the front"), rows),
    )


# ------------------------------------------------------------------------------------------------- of one evaluation


@dataclass(frozen=True, slots=True)
class _Series:
    name: str
    result: Result
    floor: bool


def evaluation(evaluated: LabelledEvaluation, group: str, words: str = "") -> Section:
    """How the divergence is spread over tokens, domains and layers. ``words``: a sentence before the plots."""
    series = [
        _Series(label, candidate.result, floor=False)
        for label, candidate in zip(evaluated.labels, evaluated.document.candidates, strict=True)
    ]
    if evaluated.document.noise_floor is not None:
        series.append(_Series(FLOOR, evaluated.document.noise_floor.result, floor=True))
    blocks: list[Block] = [*_lower_bound(evaluated), *([Note(words)] if words else []), _tail(series)]
    if any(len(one.result.domains) > 1 for one in series):
        blocks += [_domains(series), _domain_table(series)]
    blocks += _layers(series)
    return Section("quality", "Distance from the original", tuple(blocks), group)


def _lower_bound(evaluated: LabelledEvaluation) -> list[Block]:
    file = evaluated.document.reference_file
    if file is None:
        return []
    rest = f" The original gives {numbers.percentage(file.mean_rest)} to all other tokens." * math.isfinite(
        file.mean_rest
    )
    return [
        Note(
            f"The original was not run: its {file.top:,} most likely tokens of each position were read from a file. KL "
            f"divergences are lower bounds, and errors of hidden states are not known.{rest}"
        )
    ]


def survival(kld: Divergence, tokens: int) -> list[tuple[float, float]]:
    """(KLD, share of tokens with at least that), by rising KLD: of the histogram if there is one, else of the
    quantiles. A share of zero is left out."""
    counts = kld.histogram
    total = sum(counts or ())
    if counts is None or len(counts) != len(HISTOGRAM_EDGES) + 1 or not total:
        points = [(kld.median, 0.5), (kld.p90, 0.1), (kld.p99, 0.01), (kld.p999, 0.001)]
        # The largest is above the quantiles only if there are enough tokens.
        return [*points, (kld.max, 1 / tokens)] if tokens > 1000 else points
    above, found = total, list[tuple[float, float]]()
    for edge, count in zip(HISTOGRAM_EDGES, counts, strict=False):
        above -= count
        if above:
            found.append((edge, above / total))
    return found


def _tail(series: Sequence[_Series]) -> Figure:
    lines = [
        (one.name, survival(one.result.overall.kld, one.result.overall.tokens), one.floor) for one in series
    ]  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for one in series:
        kld = one.result.overall.kld
        mean = numbers.estimate(Mean(mean=kld.mean, standard_error=kld.standard_error))
        quantiles = (numbers.number(value) for value in (kld.median, kld.p90, kld.p99, kld.p999, kld.max))
        rows.append((one.name, mean, *quantiles))
    return Figure(
        title="KL divergence, token by token",
        how="A point says which share of the tokens (up) differs from the original by more than so much (right). Lower "
        "and further left is better; the right end is the rare tokens on which the model changed its mind.",
        alt=f"Share of tokens whose divergence exceeds a value, for {', '.join(one.name for one in series)}. "
        "The table has mean, median and quantiles.",
        spec=figures.tail(lines),
        table=Table(("checkpoint", "mean", "median", "90 %", "99 %", "99.9 %", "max"), tuple(rows)),
    )


def _domain_names(series: Sequence[_Series]) -> list[str]:
    return list(dict.fromkeys(name for one in series for name in one.result.domains))


def _domains(series: Sequence[_Series]) -> Figure:
    names = _domain_names(series)
    means = [(one.name, [_kld(one.result.domains.get(name)) for name in names], one.floor) for one in series]
    rows = tuple(
        (
            name,
            *(
                "-" if values[place] is None else numbers.estimate(values[place] or Mean(mean=0))
                for _, values, _ in means
            ),
        )
        for place, name in enumerate(names)
    )
    return Figure(
        title="KL divergence by domain",
        how="Each row is a kind of text. A domain far to the right of the others suffers most: more calibration text "
        "of its kind may help.",
        alt=f"Mean KL divergence for each of {numbers.counted(len(names), 'domain')} and each checkpoint, with "
        "standard errors. The table has the same numbers.",
        spec=figures.domains(names, means),
        table=Table(("domain", *(one.name for one in series)), rows),
    )


def _kld(scores: Scores | None) -> Mean | None:
    return None if scores is None else Mean(mean=scores.kld.mean, standard_error=scores.kld.standard_error)


def _domain_table(series: Sequence[_Series]) -> Table:
    rows: list[tuple[str, ...]] = []
    for name in _domain_names(series):
        for one in series:
            scores = one.result.domains.get(name)
            if scores is not None and not one.floor:
                rows.append((name, one.name, *_domain_cells(scores)))
    head = ("domain", "checkpoint", "tokens", "perplexity, original", "perplexity", "its change", "same top token")
    return Table(head, tuple(rows), left=2, title="Perplexity by domain")


def _domain_cells(scores: Scores) -> tuple[str, ...]:
    return (
        f"{scores.tokens:,}",
        numbers.estimate(scores.reference_perplexity),
        numbers.estimate(scores.perplexity),
        numbers.percentage_estimate(change(scores.log_ratio), signed=True),
        numbers.percentage_estimate(scores.same_top),
    )


def _layers(series: Sequence[_Series]) -> list[Block]:
    """Error of the hidden state and agreement of the routers, if there are layers and routers."""
    states = _by_layer(series, lambda layer: None if math.isnan(layer.hidden_error) else layer.hidden_error)
    routers = _by_layer(series, lambda layer: layer.router_agreement)
    blocks: list[Block] = []
    if any(points for _, points, _ in states):
        blocks.append(
            Figure(
                title="Error of the hidden state, layer by layer",
                how="How far the residual stream is from the original's after each layer, in percent of its length. "
                "It grows with depth; a step up at one layer says that this layer is the one to give more bits.",
                alt="A line for each checkpoint: relative error of the hidden state over the decoder layers.",
                spec=figures.by_layer(states, "error, %", log=True),
                table=_layer_table(states),
            )
        )
    if any(points for _, points, _ in routers):
        blocks.append(
            Figure(
                title="Agreement of the routers",
                how="Share of the chosen experts that the original chose too. Where routers disagree, tokens meet "
                "other weights than in the original.",
                alt="A line for each checkpoint: share of experts chosen by both, over the decoder layers.",
                spec=figures.by_layer(routers, "agreement, %", log=False),
                table=_layer_table(routers),
            )
        )
    return blocks


_ByLayer = tuple[str, list[tuple[int, float]], bool]
"""Name of a checkpoint, (layer, percent), and whether it is the noise floor."""


def _by_layer(series: Sequence[_Series], share_of: Callable[[Layer], float | None]) -> list[_ByLayer]:
    """What ``share_of`` says of each layer; layers of which it says None are left out."""
    found: list[_ByLayer] = []
    for one in series:
        shares = ((layer.layer, share_of(layer)) for layer in one.result.layers)
        found.append((one.name, [(layer, 100 * share) for layer, share in shares if share is not None], one.floor))
    return found


def _layer_table(series: Sequence[_ByLayer]) -> Table:
    layers = sorted({layer for _, points, _ in series for layer, _ in points})
    values = [dict(points) for _, points, _ in series]
    rows = tuple((str(x), *(numbers.percentage(row.get(x, math.nan) / 100) for row in values)) for x in layers)
    return Table(("layer", *(name for name, _, _ in series)), rows, long=True)
