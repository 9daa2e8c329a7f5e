"""Ctrl-C while the program is still being loaded, before a line can be said about it."""

from __future__ import annotations

import signal
import sys
from pathlib import PurePath

PROGRAM = "quantkit"


def quiet_while_loading() -> None:
    """Where the process is the program, Ctrl-C ends it from here on without a traceback, as it ends one in C.

    A program of someone else's that imports the package keeps its own handler, and so does one whose starter has it
    ignore Ctrl-C.
    """
    if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """From here on Ctrl-C is `KeyboardInterrupt` again, for whoever says a line about it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_program() -> bool:
    """While Python looks for the module of ``-m`` it has no path for ``sys.argv`` yet."""
    if sys.argv[:1] == ["-m"]:
        return ("-m", PROGRAM) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return bool(sys.argv) and PurePath(sys.argv[0]).stem == PROGRAM
