"""How a command ends: refusals become one line and a hint with exit code 1, wrong usage the same with 2, interruptions
exit code 130."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from quantkit.errors import QuantkitError

REFUSED = 1
USAGE = 2
INTERRUPTED = 130


class Commands(TyperGroup):
    """The commands, which end as this file says in place of typer's own ways: two lines for wrong usage, one line for
    Ctrl-C, and one if what they print cannot be written."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """See `typer.core.TyperGroup.main`. Does not return."""
        try:
            code = super().main(*arguments, **{**options, "standalone_mode": False})
        except typer.TyperException as error:
            _show_usage(error.format_message())
            code = error.exit_code
        except OSError as error:
            if traceback.extract_tb(error.__traceback__)[-1].name != typer.echo.__name__:
                raise
            # What could not be written goes nowhere: at its end Python would try again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            show_error(f"stdout: cannot be written ({error.strerror}).")
            code = REFUSED
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Ctrl-C is told, whatever the command is."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def refusals() -> Generator[None]:
    """Print a `QuantkitError` on stderr, each of its lines after "error: ", and exit with 1."""
    try:
        yield
    except QuantkitError as error:
        show_error(error.message, error.hint)
        raise typer.Exit(REFUSED) from None


@contextmanager
def interruptible(advice: Callable[[], str], *, quiet: bool = False) -> Generator[None]:
    """Ctrl-C and SIGTERM end the command with 130 and, unless ``quiet``, a line of advice (how to resume)."""
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        if not quiet:
            typer.echo(f"interrupted. {advice()}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def show_error(message: str, hint: str = "") -> None:
    """One "error:" line for each line of the message, then the hint. What would move a terminal's cursor is escaped."""
    for line in message.splitlines():
        typer.echo(f"error: {_escaped(line)}", err=True)
    if hint:
        typer.echo(f"hint: {_escaped(hint)}", err=True)


def _escaped(text: str) -> str:
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def missing_option(named: str) -> NoReturn:
    """End as for a required option that was not given."""
    show_error(f"Missing option {named}.", "See --help.")
    raise typer.Exit(USAGE)


def _show_usage(message: str) -> None:
    """What is wrong with a command's words. Without any words the message is the help."""
    if "\n" in message:
        typer.echo(message, err=True)
    else:
        # "Value error" is what the library calls a value that is none of an option's.
        show_error(message.replace("Value error, ", ""), "See --help.")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
