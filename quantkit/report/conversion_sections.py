"""Sections about one conversion: where the bytes are, what each layer lost, what the experts saw, the recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import yaml

from quantkit.documents.conversion import StoredRole
from quantkit.documents.evaluation import Result
from quantkit.report import figures, heat_maps, numbers
from quantkit.report.contents import Block, Code, Figure, Note, Section, Table
from quantkit.report.linears import Cell, ErrorGrid, ExpertGrid, error_grid, expert_errors, expert_grid, worst
from quantkit.report.scored import LabelledConversion

WORST = 10


def sections(
    converted: LabelledConversion, result: Result | None, group: str, *, experts: bool, recipe: bool
) -> tuple[Section, ...]:
    """``result``: of the evaluation that scored it, if one did. ``experts``, ``recipe``: whether tokens and recipe are
    shown here, and not with another conversion that has the same."""
    found = [
        _section("size", "Where the bytes are", _size(converted), group),
        _section("errors", "What quantisation lost", _errors(converted), group),
        _section(
            "experts",
            "Experts",
            [*_pruned(converted), *(_experts(converted) if experts else ()), *_expert_errors(result)],
            group,
        ),
        _section("recipe", "Recipe", _recipe(converted) if recipe else (), group),
    ]
    return tuple(section for section in found if section.blocks)


def _section(anchor: str, title: str, blocks: Sequence[Block], group: str) -> Section:
    return Section(anchor, title, tuple(blocks), group)


def _size(converted: LabelledConversion) -> list[Block]:
    rows = sorted((row for row in converted.document.contents if row.nbytes), key=lambda row: -row.nbytes)
    if not rows:
        return [Note("This conversion's quantkit.json does not say how many bytes each role has.")]
    total = sum(row.nbytes for row in rows)
    table = Table(
        ("role", "stored as", "tensors", "weights", "bits per weight", "size", "share"),
        tuple(
            (
                row.role,
                row.stored_as,
                f"{row.tensors:,}",
                f"{row.parameters:,}",
                f"{8 * row.nbytes / row.parameters:.3f}" if row.parameters else "-",
                numbers.size(row.nbytes),
                f"{row.nbytes / total:.1%}",
            )
            for row in rows
        ),
        left=2,
    )
    largest = rows[0]
    figure = Figure(
        title="Size and bits per weight by role",
        how=_size_sentence(largest, largest.nbytes / total),
        alt="Bars: bytes of each role. The table has the same numbers.",
        spec=figures.sizes(rows),
        table=table,
    )
    return [figure]


def _size_sentence(largest: StoredRole, share: float) -> str:
    part = f"{largest.role} ({largest.stored_as})"
    if share > 0.6:
        return f"{part} takes {share:.0%} of the bytes: only changes there change the size much. Scales are counted."
    return f"The largest part, {part}, takes {share:.0%} of the bytes. Scales are counted."


# -------------------------------------------------------------------------------------------------------------- errors


def _errors(converted: LabelledConversion) -> list[Block]:
    grid = error_grid(converted.document)
    if not grid.cells and not grid.outside:
        return [Note("No linear was quantised.")]
    measure = (
        "the share of a linear's output that its rounding destroys, on the calibration text"
        if grid.calibrated
        else "the squared change of a linear's weights, relative to the weights (the conversion was data-free)"
    )
    blocks: list[Block] = _poor_fits(converted)
    if grid.output_aware:
        blocks.append(Note(_AWARE))
    if grid.cells:
        blocks.append(
            Figure(
                title="Loss of each projection in each layer",
                how=f"The loss is {measure}: 1 % is a lot, 0.01 % little. For experts it is the median over a layer's "
                "experts. Rows or columns that stand out deserve more bits." + _blind_sentence(grid),
                alt=f"Heat map of {numbers.counted(len(grid.layers), 'layer')} and "
                f"{numbers.counted(len(grid.projections), 'projection')}. {_extremes(grid)}",
                spec=heat_maps.errors(grid),
                table=_grid_table(grid),
            )
        )
    blocks.append(_projection_table(grid))
    blocks.append(_worst_table(converted))
    return blocks


_AWARE = (
    "Some linears were quantised output-aware: what was lowered is the weighed loss, in which an error counts as much "
    "as the model's own loss feels it. The plain loss is larger than without, and says less."
)


def _poor_fits(converted: LabelledConversion) -> list[Block]:
    """A table of linears that lose far more than their scheme should, first of all; nothing where there are none."""
    fits = converted.document.poor_fits
    if not fits:
        return []
    note = Note(
        f"{numbers.counted(len(fits), 'linear')} lost more than five times what the same scheme loses on Gaussian "
        "weights: the weights are too small or too uneven for it. Keep them in BF16, or give them another scheme."
    )
    rows = tuple(
        (fit.name, fit.scheme, numbers.percentage(fit.relative_loss), numbers.percentage(fit.gaussian_loss))
        for fit in fits
    )
    head = ("linear", "scheme", "loss", "on Gaussian weights")
    return [note, Table(head, rows, left=2, title="Linears that do not fit their scheme", long=len(rows) > WORST)]


def _blind_sentence(grid: ErrorGrid) -> str:
    """Which rows cannot be compared with the others: layers that no text reached, such as an MTP layer whose method
    learns nothing from it."""
    if not grid.calibrated or not grid.blind:
        return ""
    layers = ", ".join(map(str, grid.blind[:5])) + (" and others" if len(grid.blind) > 5 else "")
    return f" Layer {layers} saw no text: the loss there is that of the weights, which is larger."


def _extremes(grid: ErrorGrid) -> str:
    (layer, projection), cell = max(grid.cells.items(), key=lambda item: item[1].median)
    return f"The largest loss is {numbers.percentage(cell.median)}, {projection} of layer {layer}."


def _grid_table(grid: ErrorGrid) -> Table:
    def shown(cell: Cell | None) -> str:
        return "" if cell is None else numbers.percentage(cell.median, 2)

    rows = tuple(
        (str(layer), *(shown(grid.cells.get((layer, projection))) for projection in grid.projections))
        for layer in grid.layers
    )
    return Table(("layer", *grid.projections), rows, long=True)


def _projection_table(grid: ErrorGrid) -> Table:
    rows: list[tuple[str, ...]] = []
    for projection in grid.projections:
        cells = {layer: cell for (layer, name), cell in grid.cells.items() if name == projection}
        layer, peak = max(cells.items(), key=lambda item: item[1].largest)
        whose = "" if peak.largest_expert is None else f", expert {peak.largest_expert}"
        rows.append(
            (
                projection,
                ", ".join(dict.fromkeys(cell.stored_as for cell in cells.values())),
                f"{sum(cell.count for cell in cells.values()):,}",
                numbers.percentage(statistics.median(cell.median for cell in cells.values())),
                f"{numbers.percentage(peak.largest)} (layer {layer}{whose})",
                f"{sum(cell.fallbacks for cell in cells.values()):,}",
                *_weighed(grid, list(cells.values())),
            )
        )
    rows += [
        (
            name,
            cell.stored_as,
            f"{cell.count:,}",
            numbers.percentage(cell.median),
            numbers.percentage(cell.largest),
            f"{cell.fallbacks:,}",
            *_weighed(grid, [cell]),
        )
        for name, cell in grid.outside.items()
    ]
    head = ("projection", "stored as", "linears", "median loss", "largest", "fallbacks")
    if grid.output_aware:
        head = (*head, "median weighed loss")
    return Table(head, tuple(rows), left=2, title="By projection, over all layers")


def _weighed(grid: ErrorGrid, cells: Sequence[Cell]) -> tuple[str, ...]:
    """The column of weighed losses, where there is one."""
    if not grid.output_aware:
        return ()
    known = [cell.weighed for cell in cells if cell.weighed is not None]
    return (numbers.percentage(statistics.median(known)) if known else "",)


def _worst_table(converted: LabelledConversion) -> Table:
    rows = tuple(
        (name, numbers.percentage(linear.relative_loss or 0), f"{linear.n_tokens:,}", linear.fallback)
        for name, linear in worst(converted.document, WORST)
    )
    return Table(("linear", "loss", "tokens", "fallback"), rows, title="The largest losses", long=True)


# ------------------------------------------------------------------------------------------------------------- experts


def _pruned(converted: LabelledConversion) -> list[Block]:
    """Which experts went, by layer, and how much of the scores of all went with them."""
    record = converted.document.pruning
    if record is None:
        return []
    rows: list[tuple[str, ...]] = []
    for layer, kept in record.kept.items():
        scores = [expert.score for expert in record.scores.get(layer, ())]
        gone = sorted(set(range(len(scores))) - set(kept))
        share = sum(scores[number] for number in gone) / (sum(scores) or 1.0)
        rows.append((str(layer), f"{len(kept):,}", f"{share:.1%}", ", ".join(map(str, gone))))
    note = Note(
        f"Of {record.experts:,} routed experts in each layer those with the lowest scores were left out: mean of gate "
        "weight times norm of the output over an expert's tokens, on the calibration text. Experts of this conversion "
        "have their new numbers below."
    )
    return [note, Table(("layer", "kept", "share of the scores that went", "left out"), tuple(rows), long=True)]


def _experts(converted: LabelledConversion) -> list[Block]:
    grid = expert_grid(converted.document)
    if grid is None:
        return []
    counts = grid.counts
    unseen, borrowed = counts.count(0), sum(grid.borrowed)
    summary = (
        f"{numbers.counted(len(counts), 'expert')} in {numbers.counted(len(grid.layers), 'layer')}: "
        f"{min(counts):,} to {max(counts):,} tokens, median {round(statistics.median(counts)):,}; {unseen:,} unseen, "
        f"{borrowed:,} calibrated with borrowed tokens."
    )
    figure = Figure(
        title="Calibration tokens of each expert",
        how="Each row is a layer, each cell an expert. The more a cell stands out from the page, the fewer tokens the "
        f"expert saw, and the less was known of its inputs; unseen ones have a cross. {summary}",
        alt=f"Heat map: {summary}",
        spec=heat_maps.tokens(grid),
        table=_expert_table(grid),
        zoom=True,
        summary=summary,
    )
    return [figure]


def _expert_table(grid: ExpertGrid) -> Table:
    rows = tuple(
        (
            str(layer),
            f"{len(row):,}",
            f"{min(row):,}",
            f"{round(statistics.median(row)):,}",
            f"{max(row):,}",
            f"{row.count(0):,}",
            f"{borrowed:,}",
        )
        for layer, row, borrowed in zip(grid.layers, grid.tokens, grid.borrowed, strict=True)
        if row
    )
    return Table(("layer", "experts", "least", "median", "most", "unseen", "borrowed"), rows, long=True)


def _expert_errors(result: Result | None) -> list[Block]:
    layers = () if result is None else expert_errors(result)
    if not layers:
        return []
    rows: list[tuple[str, ...]] = []
    for layer in layers:
        known = [(error, expert) for expert, error in enumerate(layer.errors) if not math.isnan(error)]
        if known:
            peak, expert = max(known)
            values = (min(known)[0], statistics.median(error for error, _ in known), peak)
            rows.append((str(layer.layer), *map(numbers.percentage, values), str(expert)))
    figure = Figure(
        title="Error of each expert's tokens",
        how="The error of the hidden state after a layer, over those tokens of the evaluation that the original sends "
        "to the expert. The more a cell stands out from the page, the larger its error: an expert that does so in its "
        "row was quantised worse than its neighbours.",
        alt=f"Heat map of {numbers.counted(len(layers), 'layer')}: error of the hidden state over each expert's "
        "tokens. The table has the least, median and largest of each layer.",
        spec=heat_maps.expert_errors(layers),
        table=Table(("layer", "least", "median", "largest", "of expert"), tuple(rows), long=True),
        zoom=True,
    )
    return [figure]


# -------------------------------------------------------------------------------------------------------------- recipe


def recipe_text(converted: LabelledConversion) -> str:
    """The recipe as a file that `quantkit convert` takes."""
    return yaml.safe_dump(converted.document.recipe, sort_keys=False, allow_unicode=True, width=110)


def _recipe(converted: LabelledConversion) -> list[Block]:
    return [Code("The recipe as it was run, defaults filled in", recipe_text(converted), "yaml")]
