"""How llama.cpp's server is started on a model file."""

from __future__ import annotations

from collections.abc import Sequence

ALL_LAYERS = 99
"""What people write for --n-gpu-layers to mean all."""
DRAFT_FLAGS = "--spec-type", "draft-mtp"
"""Without them llama.cpp neither loads an MTP layer nor drafts with it."""


def serve(file: str, flags: Sequence[str] = ()) -> str:
    """``file``: the first one, if there are several; ``flags``: what the model needs beside it
    (`GgufModel.server_flags`), and `DRAFT_FLAGS` if the file holds its MTP layer."""
    return " ".join(("llama-server", "-m", file, *flags))


def spread(n_layers: int, context: int, tensor_split: tuple[int, ...]) -> str:
    """Options besides the file: all layers on GPUs, ``tensor_split`` the share of each, sequences of up to ``context``
    tokens."""
    words = ["-ngl", str(max(ALL_LAYERS, n_layers + 1)), "-c", str(context)]
    if len(tensor_split) > 1:
        words += ["-ts", ",".join(map(str, tensor_split))]
    return " ".join(words)
