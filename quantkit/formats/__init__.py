"""Which bytes hold the numbers: readers and writers of checkpoints. `open_source` opens one that is to be quantised."""

from quantkit.formats.model_source import open_source

__all__ = ["open_source"]
