"""llama.cpp itself, as the wheel of xllamacpp carries it: loads a GGUF, tokenises, computes logits, renders chats.

`LlamaModel(path)` -> metadata, token ids, `context(...)`; `LlamaContext.logits(tokens)` -> (n, vocab) float32. Both are
context managers. `render_chat(path, messages)` -> the prompt that its server makes of the file's own chat template.
What llama.cpp refuses raises `LlamaError` with llama.cpp's message; its log is never printed.

The wheel is one shared object that exports llama.h, called here by ctypes. Parameter structs are laid out as in llama.h
of October 2026 (0.6.0-dev); `library` refuses a build whose defaults do not sit where this layout has them, and a
context refuses to run if llama.cpp logs another cache or attention than was asked for.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pytest

CacheType = Literal["f32", "f16"]

GGML_TYPES = {"f32": 0, "f16": 1}
WARN, ERROR, CONTINUED = 3, 4, 5  # enum ggml_log_level
NO_LAYER_ON_GPU = 0
SPARE_BYTES = 256  # behind each struct, for fields that a later build appends: it fills them, and gets them back


class LlamaError(Exception):
    """llama.cpp refused a file or a call; the message is its own."""


class ModelParams(c.Structure):
    """struct llama_model_params."""

    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
        ("spare", c.c_uint8 * SPARE_BYTES),
    )


class ContextParams(c.Structure):
    """struct llama_context_params, up to the last field that is set here."""

    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("spare", c.c_uint8 * SPARE_BYTES),
    )


class Batch(c.Structure):
    """struct llama_batch. A null ``pos`` counts on from the memory, null sequences mean sequence 0."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.POINTER(c.c_int8)),
    )


MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "vocab_only": False, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attn_type": -1},
    **{"yarn_ext_factor": -1.0, "yarn_orig_ctx": 0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1},
}
"""What a fresh struct must hold, by field: values that few other places hold show that the layout is the build's."""

SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c.c_void_p, (c.c_char_p, ModelParams)),
    "llama_model_free": (None, (c.c_void_p,)),
    "llama_model_get_vocab": (c.c_void_p, (c.c_void_p,)),
    "llama_model_meta_val_str": (c.c_int32, (c.c_void_p, c.c_char_p, c.c_char_p, c.c_size_t)),
    "llama_vocab_n_tokens": (c.c_int32, (c.c_void_p,)),
    "llama_tokenize": (
        c.c_int32,
        (c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool),
    ),
    "llama_init_from_model": (c.c_void_p, (c.c_void_p, ContextParams)),
    "llama_free": (None, (c.c_void_p,)),
    "llama_get_memory": (c.c_void_p, (c.c_void_p,)),
    "llama_memory_clear": (None, (c.c_void_p, c.c_bool)),
    "llama_decode": (c.c_int32, (c.c_void_p, Batch)),
    "llama_get_logits": (c.POINTER(c.c_float), (c.c_void_p,)),
}
NODE_CALLBACK = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_bool, c.c_void_p)
"""ggml_backend_sched_eval_callback: (node, whether this only asks, user data) -> wanted, or go on."""
LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)


class Library:
    """The shared object with typed functions (``call``) and what it logged since `clear_log`."""

    def __init__(self, path: Path) -> None:
        self.call: Any = c.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.call, name)
            function.restype, function.argtypes = result, list(arguments)
        self._log: list[tuple[int, str]] = []
        # Kept here: llama.cpp calls it as long as the process lives.
        self._callback = LOG_CALLBACK(self._logged)
        self.clear_log()
        self.call.llama_backend_init()
        check_defaults(self.call.llama_model_default_params(), MODEL_DEFAULTS)
        check_defaults(self.call.llama_context_default_params(), CONTEXT_DEFAULTS)

    def clear_log(self) -> None:
        """Forget the log, and listen (again): another user of llama.cpp in this process may have taken the log over."""
        self.call.llama_log_set(self._callback, None)
        self._log.clear()

    def log(self, *levels: int) -> str:
        """The lines of these levels, of all without any."""
        return "".join(text for level, text in self._log if not levels or level in levels)

    def failure(self, what: str) -> LlamaError:
        lines = [line.strip() for line in (self.log(ERROR) or self.log(WARN)).splitlines() if line.strip()]
        return LlamaError(f"{what}: {'; '.join(lines) or 'llama.cpp gave no reason'}")

    def _logged(self, level: int, text: bytes, _user_data: object) -> None:
        level = self._log[-1][0] if level == CONTINUED and self._log else level
        self._log.append((level, text.decode("utf-8", "replace")))


def check_defaults(params: c.Structure, expected: Mapping[str, object]) -> None:
    found = {name: getattr(params, name) for name in expected}
    if found != dict(expected):
        raise LlamaError(
            f"{type(params).__name__} of this build is laid out in another way: its defaults read {found}, "
            f"{dict(expected)} were expected"
        )


@functools.cache
def library() -> Library:
    """llama.cpp of this environment; the calling test is skipped without one."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("xllamacpp is not installed")
    return Library(Path(spec.origin).with_name("xllamacpp.abi3.so"))


class LlamaModel:
    """A GGUF (the first file of a split one). ``check_tensors`` has llama.cpp look for scales that are no numbers,
    ``mtp`` load the MTP layer."""

    def __init__(self, path: Path, *, vocab_only: bool = False, check_tensors: bool = True, mtp: bool = False) -> None:
        self._lib = library()
        params = self._lib.call.llama_model_default_params()
        params.n_gpu_layers = NO_LAYER_ON_GPU
        params.vocab_only, params.check_tensors, params.load_mtp = vocab_only, check_tensors, mtp
        self._lib.clear_log()
        self._model = self._lib.call.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise self._lib.failure(f"{path}: llama.cpp does not load it")
        self._vocab = self._lib.call.llama_model_get_vocab(self._model)
        self.load_log = self._lib.log()
        self.warnings = self._lib.log(WARN, ERROR)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._lib.call.llama_vocab_n_tokens(self._vocab)

    def metadata(self, key: str) -> str | None:
        """A value as llama.cpp prints it, None without that key."""
        length = self._lib.call.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if length < 0:
            return None
        buffer = c.create_string_buffer(length + 1)
        self._lib.call.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8")

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> np.ndarray:
        """Ids of a text (n,) int32. ``add_special``: with BOS and EOS as the file says; ``parse_special``: the text of
        a control token becomes that token."""
        raw = text.encode("utf-8")
        ids = np.empty(len(raw) + 2, dtype=np.int32)
        out = ids.ctypes.data_as(c.POINTER(c.c_int32))
        n = self._lib.call.llama_tokenize(self._vocab, raw, len(raw), out, len(ids), add_special, parse_special)
        assert n >= 0, f"{-n} ids of {len(raw)} bytes"
        return ids[:n].copy()

    def context(
        self, n_ctx: int, *, cache: CacheType = "f32", threads: int = 1, on_node: Any = None, mtp: bool = False
    ) -> LlamaContext:
        """A fresh context of this model, or of its MTP layer; close it before the model. ``on_node`` (`NODE_CALLBACK`)
        sees every node of the graph as it is computed."""
        return LlamaContext(self._lib, self._model, self.vocab_size, n_ctx, cache, threads, on_node, int(mtp))

    def close(self) -> None:
        if self._model:
            self._lib.call.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LlamaContext:
    """Up to ``n_ctx`` tokens in one batch, a key-value cache of the type asked for, no flash attention."""

    def __init__(
        self,
        lib: Library,
        model: int,
        vocab_size: int,
        n_ctx: int,
        cache: CacheType,
        threads: int,
        on_node: Any,
        kind: int = 0,
    ) -> None:
        self._lib, self._vocab_size, self._n_ctx = lib, vocab_size, n_ctx
        params = lib.call.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = threads
        params.ctx_type = kind
        params.flash_attn_type = 0
        params.type_k = params.type_v = GGML_TYPES[cache]
        if on_node is not None:
            params.cb_eval = c.cast(on_node, c.c_void_p)
            self._on_node = on_node  # called as long as the context lives
        lib.clear_log()
        self._context = lib.call.llama_init_from_model(model, params)
        if not self._context:
            raise lib.failure("llama.cpp makes no context")
        self.handle: int = self._context
        self._check_effect({f"K ({cache})", "flash_attn            = disabled"})

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """tokens (n,), n <= n_ctx, from position 0 -> (n, vocab) float32: row i predicts token i + 1."""
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        assert ids.ndim == 1
        assert 0 < len(ids) <= self._n_ctx, f"{len(ids)} tokens, the context holds {self._n_ctx}"
        wanted = np.ones(len(ids), dtype=np.int8)
        batch = Batch(
            n_tokens=len(ids),
            token=ids.ctypes.data_as(c.POINTER(c.c_int32)),
            logits=wanted.ctypes.data_as(c.POINTER(c.c_int8)),
        )
        call = self._lib.call
        call.llama_memory_clear(call.llama_get_memory(self._context), True)
        self._lib.clear_log()
        if call.llama_decode(self._context, batch) != 0:
            raise self._lib.failure("llama_decode")
        return np.ctypeslib.as_array(call.llama_get_logits(self._context), (len(ids), self._vocab_size)).copy()

    def close(self) -> None:
        if self._context:
            self._lib.call.llama_free(self._context)
            self._context = None

    def __enter__(self) -> LlamaContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_effect(self, expected: set[str]) -> None:
        log = self._lib.log()
        missing = {text for text in expected if text not in log}
        if missing:
            raise LlamaError(f"llama.cpp does not say {sorted(missing)} of its context, but:\n{log}")


def render_chat(path: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that llama.cpp's server makes of a chat: by its own Jinja with the file's template, tokenised, and
    shown as text again, so the BOS is in it. It ends where the assistant is to speak."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
    params.use_jinja, params.warmup, params.fit_params, params.verbosity = True, False, False, -1
    server = xllamacpp.Server(params)
    answer = server.handle_chat_completions({"messages": list(messages), "max_tokens": 1, "verbose": True})
    return answer["__verbose"]["prompt"]
