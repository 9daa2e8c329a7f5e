"""``quantkit`` and ``python -m quantkit``. The command line is loaded inside `main`, so that Ctrl-C ends that in one
line too."""

from __future__ import annotations

import os
import sys

from quantkit.interrupts import raise_again


def main() -> None:
    """Entry point of the ``quantkit`` script."""
    try:
        raise_again()
        from quantkit.cli.app import main as run

        run()
    except KeyboardInterrupt:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
