"""Are the calibration rows nearly the same text again and again? GPTQ then fits the weights to a handful of tokens.

Two measures of a sample of the rows, each blind to what the other sees: copies at any distance leave few different runs
of tokens, and copies with a number or a name changed compress to next to nothing.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

SAMPLE_TOKENS = 1 << 17  # natural text has fewer new runs the more of it there is, so the sample has one size
_LEAST_TOKENS = 2048
_RUN = 8
_LEAST_DISTINCT = 0.3  # the built-in texts have 0.82 (chats) to 0.99
_LEAST_COMPRESSED = 0.1  # the built-in texts have 0.19 (chats) to 0.62
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, bits well mixed


def repetition_warning(tokens: NDArray[np.int32], tokenizer: Tokenizer) -> str | None:
    """One line if rows (n_rows, sequence_length) repeat themselves, or None."""
    n_rows, length = tokens.shape
    if n_rows * length < _LEAST_TOKENS:
        return None
    rows = tokens[:: -(-n_rows * length // SAMPLE_TOKENS)]
    distinct, compressed = _distinct_runs(rows), _compressed(rows, tokenizer)
    if distinct >= _LEAST_DISTINCT and compressed >= _LEAST_COMPRESSED:
        return None
    return (
        f"calibration: the rows repeat each other ({distinct:.1%} of their runs of {_RUN} tokens are different, the "
        f"text compresses to {compressed:.1%}): without more varied text it gains little over rounding."
    )


def _distinct_runs(rows: NDArray[np.int32]) -> float:
    """Different runs of tokens among all runs within rows."""
    import numpy as np

    run = min(_RUN, rows.shape[1])
    n_runs = rows.shape[1] - run + 1
    keys = np.zeros((rows.shape[0], n_runs), dtype=np.uint64)
    for place in range(run):
        keys = keys * np.uint64(_MULTIPLIER) + rows[:, place : place + n_runs].astype(np.uint64)
    return np.unique(keys).size / keys.size


def _compressed(rows: NDArray[np.int32], tokenizer: Tokenizer) -> float:
    text = "\n".join(tokenizer.decode_batch(rows.tolist())).encode(errors="replace")
    return len(zlib.compress(text, 1)) / len(text) if text else 1.0
