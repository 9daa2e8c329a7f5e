"""What the functions of `quantkit.api` take, made into what the rooms take."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantkit.errors import OutputError, PlanError, SourceError

if TYPE_CHECKING:
    from quantkit.documents.evaluation import Evaluation
    from quantkit.formats.remote.places import Places
    from quantkit.formats.storage import Storage
    from quantkit.plan.machine import Machine
    from quantkit.plan.recipe import Recipe
    from quantkit.sensitivity.events import OnLosses
    from quantkit.sensitivity.settle import Settled

Parsed = TypeVar("Parsed")


def write_text(path: Path, text: str, *, append: bool = False) -> None:
    """Write UTF-8 with plain line ends; names of files that are no text, with escapes. Raises `OutputError`."""
    mode = "a" if append else "w"
    try:
        with path.open(mode, encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from None


def let_threads_sleep() -> None:
    """OpenMP's waiting threads sleep in place of spinning, which beside other work makes a conversion several times
    slower. Read when torch is loaded: then it is too late, and what the caller set is left."""
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def conversion_budget(device: str, jobs: int | None, memory_budget: int | str | None) -> int:
    """Bytes that a conversion stays under. Raises a `QuantkitError` for a device that is not there, and for numbers
    that mean nothing; sets the waiting of threads, as `let_threads_sleep`."""
    from quantkit.plan.budget import budget_bytes, check_device, check_jobs
    from quantkit.plan.hardware import default_budget

    check_device(device)
    check_jobs(jobs)
    let_threads_sleep()
    return budget_bytes(memory_budget) or default_budget()


@contextmanager
def threads(jobs: int | None) -> Generator[None]:
    """So many CPU threads for this conversion, not for what else the process does with torch."""
    import torch

    threads = torch.get_num_threads()
    try:
        if jobs is not None:
            torch.set_num_threads(jobs)
        yield
    finally:
        torch.set_num_threads(threads)


def check_context(context: int | None, gpus: object) -> None:
    """Raise `PlanError` for a length of sequences that is none, or that no GPUs are to fit."""
    if context is not None and context < 1:
        raise PlanError(f"context: found {context}, needed at least 1.")
    if context is not None and gpus is None:
        raise PlanError(
            f"--context {context:,}: is the sequence that --gpus must fit, and no GPUs were given.",
            hint="Give --gpus too, such as --gpus 8xH200-141GB, or leave --context out.",
        )


def recipe_and_folder(recipe: Recipe | Path | str, base_dir: Path | str | None) -> tuple[Recipe, Path]:
    """The recipe, and the folder that its relative paths count from."""
    from quantkit.plan.recipe import Recipe

    loaded = Recipe.from_yaml(recipe) if isinstance(recipe, Path | str) else recipe
    if not isinstance(loaded, Recipe):  # pyright: ignore[reportUnnecessaryIsInstance] - not all callers are checked
        raise TypeError(f"recipe: found {type(loaded).__name__}, needed a Recipe, a file or the name of a shipped one")
    return loaded, loaded.folder if base_dir is None else path_of(base_dir)


def settled(
    source: Path,
    config: Path | None,
    recipe: Recipe,
    folder: Path,
    device: str,
    budget: int | None,
    jobs: int | None,
    on_event: OnLosses | None,
    storage: Storage,
) -> Settled:
    """The recipe without targets, see `settle`; what it measures runs on ``device``, with ``jobs`` threads."""
    from quantkit.plan.budget import check_device, check_jobs
    from quantkit.sensitivity.settle import settle

    check_device(device)
    check_jobs(jobs)
    let_threads_sleep()
    return settle(source, config, recipe, folder, lambda: _machine(device, budget, jobs), on_event, storage)


@contextmanager
def _machine(device: str, budget: int | None, jobs: int | None) -> Generator[Machine]:
    with threads(jobs):
        from quantkit.plan.machine import Machine

        yield Machine.of(device, budget)


def parsed(name: str, parse: Callable[[str], Parsed], text: str) -> Parsed:
    """Raises `PlanError` for a value that cannot be read."""
    try:
        return parse(text)
    except ValueError as error:
        raise PlanError(f"{name}: {error}.") from None


def evaluation_of(evaluation: Evaluation | Path | str) -> Evaluation:
    if not isinstance(evaluation, Path | str):
        return evaluation
    from quantkit.evaluate.check.baseline import read_evaluation

    return read_evaluation(path_of(evaluation))


@contextmanager
def opened_places(
    *names: Path | str, cache: int | str | None = None, cache_dir: Path | str | None = None
) -> Generator[Places]:
    """Sources as folders of this machine, and the storage that opens their shards, while this is not left. ``cache``:
    bytes, or "50GiB", that pieces of remote ones may take in the folder ``cache_dir``. Raises a `QuantkitError`."""
    from quantkit.formats.remote.addresses import is_remote
    from quantkit.formats.remote.places import CacheOptions, places
    from quantkit.plan.budget import cache_bytes
    from quantkit.plan.speed import cache_folder

    folder = cache_folder() / "remote" if cache_dir is None else path_of(cache_dir)
    options = CacheOptions(folder, cache_bytes(cache))
    given = [name if isinstance(name, str) and is_remote(name) else str(path_of(name)) for name in names]
    with places(given, options) as found:
        yield found


def paths_of(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    return [path_of(paths)] if isinstance(paths, Path | str) else [path_of(path) for path in paths]


def optional_path(path: Path | str | None) -> Path | None:
    return None if path is None else path_of(path)


def output_folder(out: Path | str) -> Path:
    """Where a result goes. Raises `OutputError` for an address, `SourceError` as `path_of` does."""
    if re.match(r"(hf|s3|gs|https?):/", str(out)):  # pathlib makes one slash of two
        from quantkit.formats.remote.addresses import without_secrets

        raise OutputError(
            f"{without_secrets(str(out))}: results go to a folder of this machine.",
            hint="Give -o FOLDER, and upload it when it is complete: hf upload, aws s3 sync, gcloud storage rsync.",
        )
    return path_of(out)


def path_of(path: Path | str) -> Path:
    """Raises `SourceError` for a name that no file can have: pathlib raises errors of its own for those."""
    made = Path(path)
    try:
        os.lstat(made)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            from quantkit.formats.safetensors.header import printable

            raise SourceError(f"{printable(str(path))}: is no name of a file ({printable(str(error), 60)}).") from None
    return made
