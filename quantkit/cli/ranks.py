"""``quantkit convert`` on several ranks: who starts them, and which of them says what."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn

import typer

from quantkit.cli.exit_codes import INTERRUPTED, REFUSED, show_error
from quantkit.errors import PlanError, QuantkitError, RankLostError
from quantkit.on_ranks import refuse_address
from quantkit.ranks.launch import SILENT, launch
from quantkit.ranks.places import RankPlace, check_count, place_of

PATIENCE_S = 1.0
"""torchrun ends all ranks when the first one ends: rank 0 has so long to say why."""
RESUMES = "Give the same command again, with as many ranks or others: it goes on where it stopped."


def run_ranks(gpus: int, advice: Callable[[], str]) -> NoReturn:
    """Start the ranks of this very command, wait, and end with their exit code. ``advice``: how to resume."""
    check_count(gpus)
    if sys.argv[1:2] not in (["convert"], ["quantize"]):
        raise PlanError(f"--gpus {gpus}: starts the command line anew, and this is none.", hint="Use torchrun.")
    outcome = launch(gpus, sys.argv[1:])
    if outcome.message:
        show_error(outcome.message, RESUMES)
    if outcome.code == INTERRUPTED:
        typer.echo(f"interrupted. {advice()}", err=True)
    raise typer.Exit(outcome.code)


def refuse_unshared(gpus: int | None, layers: str | None, source: str) -> None:
    """Raise `PlanError` for a trial on several ranks, and for a source that is an address."""
    if (gpus or 1) == 1 and place_of(os.environ) is None:
        return
    if layers is not None:
        raise PlanError("--layers: a trial runs in one process.", hint="Leave --gpus and torchrun out.")
    refuse_address(source)


def check_gpus(gpus: int | None, place: RankPlace) -> None:
    """Raise `PlanError` if --gpus and whoever started the ranks say different counts."""
    if gpus is not None and gpus != place.count:
        raise PlanError(f"--gpus {gpus}: found {place.count} ranks, which were started from outside.")


@contextmanager
def speaking(place: RankPlace) -> Generator[None]:
    """As `refusals`, where each rank says what it met itself, and one that it lost others."""
    try:
        yield
    except RankLostError as error:
        if place.launched:
            raise typer.Exit(SILENT) from None
        if place.number == 0:
            show_error(error.message, error.hint)
        else:
            time.sleep(PATIENCE_S)
        raise typer.Exit(REFUSED) from None
    except QuantkitError as error:
        show_error(error.message if place.number == 0 else f"rank {place.number}: {error.message}", error.hint)
        raise typer.Exit(REFUSED) from None
