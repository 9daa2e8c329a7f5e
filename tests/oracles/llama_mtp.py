"""llama.cpp's MTP layer, as its speculative decoding runs it: the main model's hidden states go into a second context.

`draft_logits(path, tokens)` -> what the MTP layer predicts after each token but the first, given the token. The
functions are those of llama.h and src/llama-ext.h of October 2026, the latter under their C++ names.
"""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.llama_cpp import LlamaModel, library

DECODE = 1  # enum llama_process_type
SET_NEXTN = "_Z26llama_set_embeddings_nextnP13llama_contextbb"
GET_NEXTN = "_Z26llama_get_embeddings_nextnP13llama_context"


class Embedding(c.Structure):
    """struct llama_embd."""

    _fields_ = (("data", c.c_void_p), ("n_rows", c.c_size_t), ("n_embd", c.c_size_t))


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    SET_NEXTN: (None, (c.c_void_p, c.c_bool, c.c_bool)),
    GET_NEXTN: (c.POINTER(c.c_float), (c.c_void_p,)),
    "llama_batch_ext_init": (c.c_void_p, (c.c_void_p,)),
    "llama_batch_ext_free": (None, (c.c_void_p,)),
    "llama_batch_ext_add_token": (c.c_int32, (c.c_void_p, c.c_int32, c.c_int32)),
    "llama_batch_ext_set_pos": (c.c_bool, (c.c_void_p, c.c_int32, c.POINTER(c.c_int32))),
    "llama_batch_ext_set_embd_state": (c.c_bool, (c.c_void_p, c.c_int32, Embedding)),
    "llama_batch_ext_set_output_logits": (c.c_bool, (c.c_void_p, c.c_int32, c.c_bool)),
    "llama_process": (c.c_int32, (c.c_void_p, c.c_int, c.c_void_p)),
}


def draft_logits(path: Path, tokens: np.ndarray, hidden_size: int) -> np.ndarray:
    """tokens (n,) int32 from position 0 -> (n - 1, vocab) float32: row i predicts token i + 2."""
    call = library().call
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(call, name)
        function.restype, function.argtypes = result, list(arguments)
    with (
        LlamaModel(path, mtp=True) as model,
        model.context(len(tokens)) as main,
        model.context(len(tokens), mtp=True) as draft,
    ):
        getattr(call, SET_NEXTN)(main.handle, True, False)
        getattr(call, SET_NEXTN)(draft.handle, True, True)
        main.logits(tokens)
        hidden = np.ctypeslib.as_array(getattr(call, GET_NEXTN)(main.handle), (len(tokens), hidden_size)).copy()
        _decode(call, draft.handle, tokens[1:], hidden[:-1])
        found = call.llama_get_logits(draft.handle)
        return np.ctypeslib.as_array(found, (len(tokens) - 1, model.vocab_size)).copy()


def _decode(call: Any, context: int, tokens: np.ndarray, hidden: np.ndarray) -> None:
    """Each token (n,) with the hidden state before it (n, hidden), through a context of the MTP layer."""
    batch = call.llama_batch_ext_init(context)
    for i, (token, state) in enumerate(zip(tokens, hidden, strict=True)):
        assert call.llama_batch_ext_add_token(batch, 0, int(token)) == i
        assert call.llama_batch_ext_set_pos(batch, i, (c.c_int32 * 4)(i))
        assert call.llama_batch_ext_set_embd_state(batch, i, Embedding(state.ctypes.data, 1, len(state)))
        assert call.llama_batch_ext_set_output_logits(batch, i, True)
    assert call.llama_process(context, DECODE, batch) == 0
    call.llama_batch_ext_free(batch)
