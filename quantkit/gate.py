"""`check` and `update_baseline` as functions. They keep the conventions of `quantkit.api`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.arguments import evaluation_of, path_of, write_text

if TYPE_CHECKING:
    from quantkit.documents.baseline import Baseline
    from quantkit.documents.evaluation import Evaluation
    from quantkit.evaluate.check.verdict import Limits, Verdict


def check(
    evaluation: Evaluation | Path | str,
    baseline: Path | str,
    *,
    candidates: str | Sequence[str] = (),
    limits: Limits | None = None,
) -> tuple[Verdict, ...]:
    """What of an evaluation is worse than its ``baseline``, a file of `update_baseline`, beyond noise: one verdict for
    each candidate, or for those named. ``limits``: what counts as noise, and limits of your own.

    A regression is no error: see ``passed`` of the verdicts. Raises `EvaluationError` for what cannot be compared:
    another text, other windows, another reference.
    """
    from quantkit.evaluate.check.baseline import check_comparable, read_baseline, read_losses
    from quantkit.evaluate.check.run import check as run
    from quantkit.evaluate.check.verdict import Limits

    chosen = limits or Limits()
    found, old = evaluation_of(evaluation), read_baseline(path_of(baseline))
    check_comparable(found, old, path_of(baseline))
    losses = read_losses(found, Path()) if chosen.losses else {}
    return run(found, old, chosen, losses, (candidates,) if isinstance(candidates, str) else candidates)


def update_baseline(evaluation: Evaluation | Path | str, baseline: Path | str) -> Baseline:
    """Make an evaluation the baseline of later checks: a JSON file to be committed. Raises `QuantkitError`."""
    from quantkit.documents.baseline import Baseline
    from quantkit.evaluate.check.baseline import by_name, check_windows, read_losses

    found = evaluation_of(evaluation)
    by_name(found)  # refuses two candidates of one name
    check_windows("evaluation", found)
    made = Baseline(evaluation=found, conversions=read_losses(found, Path()))
    write_text(path_of(baseline), made.to_json())
    return made
