"""``quantkit check``: an evaluation against a committed baseline, for CI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import gate as commands
from quantkit.arguments import write_text
from quantkit.cli.exit_codes import REFUSED, refusals, show_error
from quantkit.errors import EvaluationError
from quantkit.text.verdict import verdicts_text

if TYPE_CHECKING:
    from quantkit.evaluate.check.verdict import Limits, Verdict


def share(text: object) -> float:
    """0.015 of "1.5%" or "0.015"; for typer, which hands defaults over as they are."""
    word = str(text).strip()
    try:
        value = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"found {word[:40]!r}, needed a share such as 1.5% or 0.015")
    return value


EvaluationFile = Annotated[Path, typer.Argument(metavar="EVALUATION", help="A file of `quantkit evaluate --out`.")]
BaselineFile = Annotated[
    Path,
    typer.Option("--baseline", "-b", metavar="FILE", help="Evaluation to compare with; commit it to the repository."),
]
Candidate = Annotated[
    list[str] | None,
    typer.Option("--candidate", metavar="NAME", help="Check this candidate only; may be repeated. Default: all."),
]
Sigmas = Annotated[
    float,
    typer.Option(
        "--sigmas",
        min=1,
        max=20,
        metavar="N",
        help="A difference of up to so many standard deviations (of paired windows, and of the seed) counts as noise.",
    ),
]
Spread = Annotated[
    float,
    typer.Option(
        "--spread",
        parser=share,
        metavar="SHARE",
        help="Relative spread of the mean KL divergence of conversions that differ in their seed only.",
    ),
]
MaxKld = Annotated[
    float | None,
    typer.Option("--max-kld", min=0, metavar="NATS", help="Also fail if the mean KL divergence is above this."),
]
MaxPerplexityIncrease = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-increase",
        parser=share,
        metavar="SHARE",
        help="Also fail if the perplexity exceeds the reference's by more than this share.",
    ),
]
MaxSizeIncrease = Annotated[
    float,
    typer.Option(
        "--max-size-increase",
        parser=share,
        metavar="SHARE",
        help="Largest growth of the tensors' bytes over the baseline's.",
    ),
]
Losses = Annotated[
    bool,
    typer.Option(
        "--losses/--no-losses", help="Compare the loss of each linear, from quantkit.json beside the checkpoint."
    ),
]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")]
Markdown = Annotated[
    Path | None,
    typer.Option(
        "--markdown", metavar="FILE", help="Write a summary; also append it to $GITHUB_STEP_SUMMARY if that is set."
    ),
]
UpdateBaseline = Annotated[
    bool,
    typer.Option("--update-baseline", help="Show what changed, then make the evaluation the baseline; exit with 0."),
]


def check(
    evaluation: EvaluationFile,
    baseline: BaselineFile,
    candidate: Candidate = None,
    sigmas: Sigmas = 4.0,
    spread: Spread = 0.015,
    max_kld: MaxKld = None,
    max_perplexity_increase: MaxPerplexityIncrease = None,
    max_size_increase: MaxSizeIncrease = 0.001,
    losses: Losses = True,
    junit: Junit = None,
    markdown: Markdown = None,
    update_baseline: UpdateBaseline = False,
) -> None:
    """Fail if an evaluation is worse than its baseline, beyond noise.

    Exit code 1 and a line for each regression, which names the layer, expert or linear. Both must be of the same text,
    windows and reference; anything else is refused.
    """
    from quantkit.evaluate.check.verdict import Limits

    limits = Limits(
        sigmas=sigmas,
        spread=spread,
        max_kld=max_kld,
        max_perplexity_increase=max_perplexity_increase,
        size_increase=max_size_increase,
        losses=losses,
    )
    with refusals():
        if update_baseline:
            if candidate:
                raise EvaluationError("--update-baseline takes no --candidate: a baseline is of all candidates.")
            _write_reports(_update(evaluation, baseline, limits), junit, markdown)
            return
        verdicts = commands.check(evaluation, baseline, limits=limits, candidates=candidate or ())
        _write_reports(verdicts, junit, markdown)
    typer.echo(verdicts_text(verdicts))
    _show_regressions(verdicts)
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(REFUSED)


def _update(evaluation: Path, path: Path, limits: Limits) -> tuple[Verdict, ...]:
    """Make the evaluation the baseline, after a table of what that changes if there is one to compare with."""
    from quantkit.evaluate.check.baseline import read_evaluation

    found = read_evaluation(evaluation)
    verdicts: tuple[Verdict, ...] = ()
    if path.exists():
        try:
            verdicts = commands.check(found, path, limits=limits)
        except EvaluationError as error:
            typer.echo(f"the old baseline is no comparison: {error.message}")
        else:
            typer.echo(verdicts_text(verdicts) + "\n")
    commands.update_baseline(found, path)
    names = ", ".join(candidate.model.name for candidate in found.candidates)
    typer.echo(f"{path}: is the baseline of {names} now. Commit it.")
    return verdicts


def _write_reports(verdicts: Sequence[Verdict], junit: Path | None, markdown: Path | None) -> None:
    from quantkit.evaluate.check.reports import junit_xml
    from quantkit.evaluate.check.reports import markdown as summary

    if junit is not None:
        write_text(junit, junit_xml(verdicts))
    if markdown is not None:
        write_text(markdown, summary(verdicts))
        step = os.environ.get("GITHUB_STEP_SUMMARY")
        if step:
            write_text(Path(step), summary(verdicts), append=True)


def _show_regressions(verdicts: Sequence[Verdict]) -> None:
    from quantkit.evaluate.check.reports import regression_lines

    for line in regression_lines(verdicts):
        show_error(line)
