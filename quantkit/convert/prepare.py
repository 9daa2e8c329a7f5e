"""Everything about a conversion that can be known to fail without torch: source, recipe, texts, imatrix, OUT.

A mistake in the command is refused in a fraction of a second, and what was read for that is used by the conversion: the
source stays open, the plan is made once.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import TokenRows, token_rows
from quantkit.convert.folder import is_begun, refuse_taken, refuse_to_lose
from quantkit.documents.pruning import Scores
from quantkit.errors import CalibrationError
from quantkit.formats.model_source import ModelSource
from quantkit.formats.storage import LOCAL, Storage
from quantkit.plan.forecast import forecast_of
from quantkit.plan.gguf_model import config_folder, open_model
from quantkit.plan.headers import headers_of, zero_limits
from quantkit.plan.known_scores import known_scores
from quantkit.plan.memory import Needs, check_free_disk
from quantkit.plan.plan import Plan, largest_layer
from quantkit.plan.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that nothing known speaks against. ``source``: open; ``rows``: the calibration text as tokens, None
    if data-free; ``base_dir``: where the recipe's relative files lie; ``restart``: discard an unfinished job and
    replace an existing ``out``.

    ``arch``: the model that is written; ``whole``: that of ``source``, another one if experts are pruned, whose
    ``scores`` an earlier conversion may have found."""

    source: ModelSource
    arch: ModelArch
    whole: ModelArch
    plan: Plan
    needs: Needs
    rows: TokenRows | None
    out: Path
    base_dir: Path
    restart: bool
    scores: Scores | None = None


@contextmanager
def prepared(
    source: Path,
    config: Path | None,
    recipe: Recipe,
    out: Path,
    base_dir: Path,
    memory_budget: int,
    *,
    restart: bool,
    storage: Storage = LOCAL,
) -> Generator[Job]:
    """Open the checkpoint ``source``, a folder or GGUF, and plan its conversion. ``config``: see `open_model`;
    ``memory_budget``: bytes to stay under; ``storage``: opens the shards.

    Loads no torch and changes nothing on the disk. Raises what `forecast` raises, `CalibrationError` for unusable text,
    `OutputError` if ``out`` exists, or is or holds what the conversion reads, `PlanError` if its disk is too full.
    """
    imatrix = () if recipe.imatrix is None else (base_dir / recipe.imatrix,)
    refuse_to_lose(out, source, config_folder(source, config), base_dir, *imatrix, Path.cwd(), Path("~").expanduser())
    refuse_taken(out, [output.name for output in recipe.outputs], restart=restart)
    with open_model(source, config, storage) as opened:
        headers = headers_of(opened)
        storage.check_room(source, largest_layer(headers.arch, headers.infos, headers.stored), "the largest layer")
        found = forecast_of(headers, recipe, base_dir=base_dir, memory_budget=memory_budget, storage=storage)
        if not recipe.allow_zeros:
            opened.refuse_zeros(zero_limits(headers.arch))
        if not is_begun(out) and not out.exists():  # else the conversion counts what is written already
            check_free_disk(found.needs, out)
        rows = None if recipe.calibration is None else token_rows(recipe.calibration, opened.directory, base_dir)
        if recipe.tune is not None and rows is not None and len(rows.tokens) < 2:
            raise CalibrationError(
                "tune: found 1 calibration row, needed at least 2: one decides whether what the others taught is kept.",
                hint="More calibration tokens, or a shorter sequence_length.",
            )
        scores = _known_scores(recipe, opened, headers.arch, base_dir)
        arch = found.source.arch
        yield Job(opened, arch, headers.arch, found.plan, found.needs, rows, out, base_dir, restart, scores)


def _known_scores(recipe: Recipe, source: ModelSource, whole: ModelArch, base_dir: Path) -> Scores | None:
    if recipe.prune is None or recipe.prune.scores is None:
        return None
    return known_scores(base_dir / recipe.prune.scores, whole, source.fingerprint())
