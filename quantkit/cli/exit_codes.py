"""How a command ends: refusals become one line and a hint with exit code 1, interruptions exit code 130."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from quantkit.errors import QuantkitError

REFUSED = 1
USAGE = 2
INTERRUPTED = 130


@contextmanager
def refusals() -> Generator[None]:
    """Print a `QuantkitError` on stderr, each of its lines after "error: ", and exit with 1."""
    try:
        yield
    except QuantkitError as error:
        show_error(error.message, error.hint)
        raise typer.Exit(REFUSED) from None


@contextmanager
def interruptible(advice: Callable[[], str]) -> Generator[None]:
    """Ctrl-C and SIGTERM end the command with 130 and a line of advice (how to resume)."""
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted. {advice()}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def show_error(message: str, hint: str = "") -> None:
    """One "error:" line for each line of the message, then the hint."""
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)


def missing_option(named: str) -> NoReturn:
    """End as for a required option that was not given."""
    show_error(f"Missing option {named}.", "See --help.")
    raise typer.Exit(USAGE)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
