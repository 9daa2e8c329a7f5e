"""``python -m quantkit``: the same as the ``quantkit`` script."""

from quantkit.cli.app import main

if __name__ == "__main__":
    main()
