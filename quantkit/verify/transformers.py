"""transformers' load contract beyond `quantkit.runtimes.transformers`. Observed in 5.23."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.formats.layouts.compressed_tensors_config import ALWAYS_IGNORED
from quantkit.runtimes import transformers
from quantkit.verify.checkpoint import Checkpoint
from quantkit.verify.vllm import in_files


def faults(checkpoint: Checkpoint) -> Iterator[str]:
    """What keeps transformers from loading the folder as it was meant."""
    if checkpoint.resolver is not None and checkpoint.resolver.scheme(ALWAYS_IGNORED) is not None:
        yield f"{ALWAYS_IGNORED}: a target of config.json takes it (it is a Linear there) and ignore does not name it."

    yield from transformers.problems(in_files(checkpoint), checkpoint.method)


def notes(checkpoint: Checkpoint) -> Iterator[str]:
    """What it does not take of the layout."""
    yield from transformers.notes(in_files(checkpoint), checkpoint.method)
