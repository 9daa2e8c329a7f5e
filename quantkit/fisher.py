"""`sensitivity` as a function, with the options of the command. It keeps the conventions of `quantkit.api`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantkit.arguments import let_threads_sleep, opened_places, output_folder, threads

if TYPE_CHECKING:
    from quantkit.documents.sensitivity import SensitivityDocument
    from quantkit.sensitivity.events import OnFisher


def sensitivity(
    source: Path | str,
    out: Path | str,
    *,
    data: str | Sequence[str] = (),
    tokens: int = 32768,
    sequence_length: int | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    memory_budget: int | str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    force: bool = False,
    cache: int | str | None = None,
    cache_dir: Path | str | None = None,
    on_event: OnFisher | None = None,
) -> SensitivityDocument:
    """A Fisher pass over the original model in folder ``source``: how much the loss feels errors of each linear's
    output, and what later conversions need for its gradients, into the folder ``out``.

    ``data``: text, relative to the current folder (default: builtin:mixed); ``tokens``: of it, in rows of
    ``sequence_length`` (default: 2,048, or what the model is made for); ``seed``: of the rows' places and of the
    sampled labels; ``restart``: discard what is in ``out``, of another checkpoint only with ``force``, else a call that
    was interrupted goes on where it stopped. The other options are those of `convert`. Raises `QuantkitError`.
    """
    from quantkit.plan.budget import budget_bytes, check_device, check_jobs
    from quantkit.plan.hardware import default_budget
    from quantkit.sensitivity.prepare import Text, prepared

    check_device(device)
    check_jobs(jobs)
    let_threads_sleep()
    text = Text((data,) if isinstance(data, str) else tuple(data), tokens, sequence_length, seed)
    with (
        opened_places(source, cache=cache, cache_dir=cache_dir) as opened,
        prepared(
            opened.folders[0], output_folder(out), text, restart=restart, force=force, storage=opened.storage
        ) as request,
        threads(jobs),
    ):
        from quantkit.plan.machine import Machine
        from quantkit.sensitivity.run import run

        machine = Machine.of(device, budget_bytes(memory_budget) or default_budget())
        return run(request, machine, on_event or (lambda event: None))
