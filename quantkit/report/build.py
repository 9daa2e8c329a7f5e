"""ScoredCheckpoints -> the contents of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.errors import OutputError
from quantkit.report import conversion_sections, figures, numbers, provenance, quality
from quantkit.report.contents import Card, Figure, Note, ReportPage, Section, Table
from quantkit.report.linears import expert_grid
from quantkit.report.predicted import predicted
from quantkit.report.scored import LabelledConversion, ScoredCheckpoint, ScoredCheckpoints


def report_of(found: ScoredCheckpoints, title: str | None = None) -> ReportPage:
    """Sections in reading order: scores, then each checkpoint from the inside, then where it all comes from. Raises
    `OutputError` for documents that are about nothing: an evaluation without candidates."""
    if not found.checkpoints:
        raise OutputError("The documents are about no checkpoint.", hint="Evaluate at least one candidate.")
    return ReportPage(
        title=title or _title(found),
        subtitle=_subtitle(found),
        cards=_cards(found),
        sections=tuple(_sections(found)),
        warnings=tuple(_warnings(found)),
        groups=_groups(found),
        checkpoints=tuple(checkpoint.label for checkpoint in found.checkpoints),
    )


def _title(found: ScoredCheckpoints) -> str:
    if len(found.checkpoints) == 1:
        return found.checkpoints[0].label
    return f"{numbers.counted(len(found.checkpoints), 'checkpoint')} of {_source(found) or 'a model'}"


def _source(found: ScoredCheckpoints) -> str:
    """What all checkpoints were made of; "" if that is not one model or not known."""
    names = {c.document.source for c in found.conversions} | {e.document.reference.name for e in found.evaluations}
    return names.pop() if len(names) == 1 else ""


def _subtitle(found: ScoredCheckpoints) -> str:
    source = _source(found)
    versions = sorted({c.document.quantkit for c in found.conversions})
    made = f"quantised by quantkit {', '.join(versions)}" if versions else "measured by quantkit"
    return f"{source}, {made}" if source and len(found.checkpoints) == 1 else made[0].upper() + made[1:]


def _warnings(found: ScoredCheckpoints) -> list[Note]:
    notes: list[Note] = []
    for converted in found.conversions:
        document = converted.document
        problems = () if document.validation is None else document.validation.problems
        if document.validated is False:
            why = "; ".join(problems) or "its scores exceed the limits of the recipe"
            notes.append(Note(f"{converted.label} did not pass the validation of its recipe: {why}.", warning=True))
    if not any(checkpoint.score for checkpoint in found.checkpoints):
        notes.append(
            Note("Nothing was measured: run quantkit evaluate and give its JSON document to this report.", warning=True)
        )
    return notes


# --------------------------------------------------------------------------------------------------------------- cards


def _cards(found: ScoredCheckpoints) -> tuple[Card, ...]:
    if len(found.checkpoints) == 1:
        return tuple(_cards_of(found, found.checkpoints[0]))
    smallest = min(found.checkpoints, key=lambda checkpoint: checkpoint.nbytes)
    cards = [
        Card("Checkpoints", f"{len(found.checkpoints):,}", _measured(found.checkpoints)),
        Card("Smallest", numbers.size(smallest.nbytes), f"{smallest.label}, {smallest.bpw:.3f} bits per weight"),
    ]
    groups = quality.comparable(found.checkpoints)
    if groups:
        group = max(groups, key=len)
        closest = min(group, key=lambda checkpoint: checkpoint.score.kld.mean if checkpoint.score else 0)
        assert closest.score is not None
        value, spread = numbers.parts(quality.kld_text(closest.score))
        cards.append(Card("Closest to the original", value, f"{closest.label}: mean KLD, nats per token", spread))
    floors = [e.document.noise_floor for e in found.evaluations if e.document.noise_floor is not None]
    if floors:
        value = numbers.number(floors[0].result.overall.kld.mean, 2)
        cards.append(Card("Noise floor", value, "KLD of the original against itself in bfloat16"))
    return tuple(cards)


def _measured(checkpoints: Sequence[ScoredCheckpoint]) -> str:
    tokens = {checkpoint.score.tokens for checkpoint in checkpoints if checkpoint.score is not None}
    return f"measured on {max(tokens):,} tokens" if tokens else "not measured"


def _cards_of(found: ScoredCheckpoints, checkpoint: ScoredCheckpoint) -> list[Card]:
    """Headline numbers of one checkpoint."""
    cards = [
        Card("Size", numbers.size(checkpoint.nbytes), _size_note(found, checkpoint)),
        Card("Bits per weight", f"{checkpoint.bpw:.3f}", _bits_note(checkpoint)),
    ]
    score = checkpoint.score
    if score is not None:
        floor = next((e.document.noise_floor for e in found.evaluations if e.document.noise_floor), None)
        note = f"nats per token, {score.measured_by}"
        if floor is not None:
            note = f"nats per token; noise floor {numbers.number(floor.result.overall.kld.mean, 2)}"
        change = numbers.percentage_estimate(quality.change(score.log_ratio), signed=True)
        original = numbers.number(score.reference_perplexity.mean, 4)
        measured = f"of {score.tokens:,} tokens in {score.windows:,} windows"
        kld, kld_spread = numbers.parts(quality.kld_text(score))
        top, top_spread = numbers.parts(numbers.percentage_estimate(score.same_top))
        cards += [
            Card("Mean KL divergence", kld, note, kld_spread),
            Card(
                "Perplexity", numbers.number(score.perplexity.mean, 4), f"original {original}; change {change}, paired"
            ),
            Card("Same top token", top, measured, top_spread),
        ]
    return cards


def _size_note(found: ScoredCheckpoints, checkpoint: ScoredCheckpoint) -> str:
    note = numbers.binary_size(checkpoint.nbytes)
    for evaluated in found.evaluations:
        reference = evaluated.document.reference
        if reference.nbytes:
            return f"{note}; {checkpoint.nbytes / reference.nbytes:.0%} of {reference.name}"
    return note


def _bits_note(checkpoint: ScoredCheckpoint) -> str:
    if checkpoint.conversion is None:
        return ""
    rows = [row for row in checkpoint.conversion.document.contents if row.nbytes and row.parameters]
    if not rows:
        return ""
    largest = max(rows, key=lambda row: row.parameters)
    return f"{largest.role}: {8 * largest.nbytes / largest.parameters:.3f} ({largest.stored_as})"


# ------------------------------------------------------------------------------------------------------------ sections


def _sections(found: ScoredCheckpoints) -> list[Section]:
    sections: list[Section] = []
    several_checkpoints = len(found.checkpoints) > 1
    words = "" if several_checkpoints else quality.in_practice(found.checkpoints[0])
    if several_checkpoints:
        sections.append(quality.comparison(found))
    for evaluated in found.evaluations:
        group = evaluated.path.name if len(found.evaluations) > 1 else ""
        sections.append(quality.evaluation(evaluated, group, words))
    if not found.evaluations and not several_checkpoints:
        sections += _validation(found.checkpoints[0], words)
    blocks = tuple(predicted(found.checkpoints))
    if blocks:
        sections.append(Section("expected", "Expected against measured", blocks))
    several = len(found.conversions) > 1
    if several:
        sections += _sizes(found.conversions)
    results = {one.conversion.folder: one.result for one in reversed(found.checkpoints) if one.conversion is not None}
    shown: list[object] = []
    for number, converted in enumerate(found.conversions):
        experts, recipe, text = (
            expert_grid(converted.document),
            converted.document.recipe,
            converted.document.calibration,
        )
        group = converted.label if several else ""
        sections += conversion_sections.sections(
            converted, results.get(converted.folder), group, experts=experts not in shown, recipe=recipe not in shown
        )
        first = provenance.same_job(converted, found.conversions[:number])
        sections.append(provenance.conversion(converted, group, first, text=text not in shown))
        shown += [experts, recipe, text]
    if found.evaluations:
        sections.append(provenance.evaluations(found.evaluations))
    return sections


def _groups(found: ScoredCheckpoints) -> dict[str, str]:
    """The headline numbers of each conversion in a line."""
    notes: dict[str, str] = {}
    for checkpoint in found.checkpoints:
        score = "" if checkpoint.score is None else f", KLD {quality.kld_text(checkpoint.score)}"
        notes.setdefault(
            checkpoint.label, f"{numbers.size(checkpoint.nbytes)}, {checkpoint.bpw:.3f} bits per weight{score}"
        )
    return notes


def _validation(checkpoint: ScoredCheckpoint, words: str) -> list[Section]:
    """What the conversion's own validation found, in numbers and in ``words``."""
    score = checkpoint.score
    if score is None:
        return []
    rows = (
        ("perplexity, original", numbers.estimate(score.reference_perplexity)),
        ("perplexity, quantised", numbers.estimate(score.perplexity)),
        ("its change, paired", numbers.percentage_estimate(quality.change(score.log_ratio), signed=True)),
        ("mean KL divergence", f"{numbers.estimate(score.kld)} nats per token"),
        *((f"{share:.0%} of the tokens below", f"{numbers.number(kld)} nats") for share, kld in score.quantiles),
        ("same top token", numbers.percentage_estimate(score.same_top)),
        ("measured on", f"{score.tokens:,} tokens in {score.windows:,} windows"),
    )
    more = Note(
        "This is the short validation of the conversion itself. quantkit evaluate measures more: by domain, by layer, "
        "with a noise floor; give this report its JSON document too."
    )
    return [
        Section(
            "quality", "Distance from the original", (*([Note(words)] if words else []), Table(("", ""), rows), more)
        )
    ]


def _sizes(conversions: Sequence[LabelledConversion]) -> list[Section]:
    """Bytes by role, all conversions side by side."""
    parts: list[tuple[str, dict[str, int]]] = []
    for converted in conversions:
        bytes_of: dict[str, int] = {}
        for row in converted.document.contents:
            if row.nbytes:
                bytes_of[row.role] = bytes_of.get(row.role, 0) + row.nbytes
        if bytes_of:
            parts.append((converted.label, bytes_of))
    if not parts:
        return []
    largest = _largest_roles([row for _, row in parts])
    shown = [(label, _with_rest(row, largest)) for label, row in parts]
    roles = list(dict.fromkeys(role for _, row in shown for role in row))
    rows = tuple((label, *(numbers.size(row.get(role, 0)) for role in roles)) for label, row in shown)
    figure = Figure(
        title="Bytes by role",
        how="What each checkpoint spends its bytes on.",
        alt=f"Stacked bars: bytes by role of {numbers.counted(len(parts), 'checkpoint')}.",
        spec=figures.sizes_compared(shown),
        table=Table(("checkpoint", *roles), rows),
    )
    return [Section("sizes", "Sizes side by side", (figure,))]


def _largest_roles(rows: Sequence[Mapping[str, int]]) -> list[str]:
    """As many roles as a plot has colours for, largest first; the last colour is for what remains."""
    totals = {role: sum(row.get(role, 0) for row in rows) for row in rows for role in row}
    return sorted(totals, key=lambda role: -totals[role])[: figures.PALETTE - 2]


def _with_rest(row: Mapping[str, int], roles: Sequence[str]) -> dict[str, int]:
    """Bytes of ``roles``, and of all others together."""
    rest = sum(nbytes for role, nbytes in row.items() if role not in roles)
    return {**{role: row.get(role, 0) for role in roles}, **({"other": rest} if rest else {})}
