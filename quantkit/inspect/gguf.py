"""What a GGUF model holds: metadata that matters, weights by role and type, and what is unusual about it. Headers only.

Files of every architecture are listed by type; those of `KNOWN_GGUF` by role too, and compared with the
tensors that their own metadata describes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.gguf.values import Scalar
from quantkit.formats.safetensors.header import printable
from quantkit.inspect.imatrix import ImatrixBeside, ImatrixInspection, imatrix_beside, inspect_imatrix
from quantkit.inspect.known_gguf import KNOWN_GGUF
from quantkit.inspect.storage import UNKNOWN_ROLE, StorageSummary, counted
from quantkit.runtimes.llama_cpp.presets import FILE_TYPES, is_quantised
from quantkit.schemes.ggml.types import BLOCK_TYPES
from quantkit.tensors import Role

SETTINGS = (
    "block_count",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "expert_count",
    "expert_used_count",
    "expert_shared_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_gating_func",
    "expert_weights_scale",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.yarn_log_multiplier",
    "attention.indexer.head_count",
    "attention.indexer.top_k",
    "vocab_size",
)
"""Keys of an architecture that are shown, without its name in front."""

_DECODED = {*BLOCK_TYPES, "F32", "F16", "BF16"}
_OTHER_FILE_TYPES = {36: "TQ1_0", 37: "TQ2_0", 39: "NVFP4", 40: "Q1_0"}
"""enum llama_ftype, what `FILE_TYPES` lacks."""
_GUESSED = 1024  # LLAMA_FTYPE_GUESSED
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.")
_LISTED_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer inside a file: llama.cpp's names of its model and its pre-tokenizer ("" for none)."""

    model: str
    pre: str
    tokens: int
    chat_template: bool


@dataclass(frozen=True, slots=True, repr=False)
class GgufInspection:
    """All that headers tell. ``path``: the first file; ``file_type``: llama_ftype by name; ``file_bytes``: all files
    with headers and padding; ``settings``: those of `SETTINGS` that the file has, arrays by their length."""

    path: Path
    architecture: str
    name: str
    file_type: str
    files: int
    file_bytes: int
    settings: Mapping[str, Scalar]
    vocabulary: Vocabulary | None
    stored_tensors: int
    holdings: tuple[StorageSummary, ...]
    imatrix: ImatrixBeside | None
    unusual: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Weights in all files."""
        return sum(holding.parameters for holding in self.holdings)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(holding.nbytes for holding in self.holdings)

    @property
    def bpw(self) -> float:
        """Stored bits per weight of the whole."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def __repr__(self) -> str:
        named = f"{self.architecture or 'unknown architecture'}, {self.file_type or 'type not stated'}"
        size = f"{self.stored_tensors:,} tensors, {self.nbytes:,} bytes, {self.bpw:.3f} bpw"
        return f"<GgufInspection {self.path}: {named}; {size}; {len(self.unusual)} unusual>"


def inspect_gguf(path: Path) -> GgufInspection | ImatrixInspection:
    """A model, by any of its files or by its folder, or an imatrix file. Raises `SourceError` for damaged files and
    incomplete split sets; what is merely odd is reported."""
    with GgufReader(path) as model:
        if model.get("general.type") != "imatrix":
            return _inspection(model)
        first = model.path
    return inspect_imatrix(first)


def _inspection(model: GgufReader) -> GgufInspection:
    architecture = _text(model, "general.architecture")
    vocabulary = _vocabulary(model)
    unusual = [*_general_lines(model, architecture), *_vocabulary_lines(model, architecture, vocabulary)]
    unusual += [*_layer_lines(model, architecture), *_type_lines(model)]
    if architecture in KNOWN_GGUF:
        unusual += KNOWN_GGUF[architecture].oddities(model)
    imatrix = imatrix_beside(model, unusual)
    return GgufInspection(
        path=model.path,
        architecture=architecture,
        name=_text(model, "general.name"),
        file_type=_file_type(model),
        files=len(model.headers),
        file_bytes=sum(header.size for header in model.headers),
        settings=_settings(model, architecture),
        vocabulary=vocabulary,
        stored_tensors=len(model.tensors),
        holdings=_storage(model, architecture),
        imatrix=imatrix,
        unusual=tuple(unusual),
    )


def _text(model: GgufReader, key: str) -> str:
    """A string of the file, fit for a line; "" if it has none."""
    found = model.get(key)
    return printable(found) if isinstance(found, str) else ""


def _file_type(model: GgufReader) -> str:
    found = model.get("general.file_type")
    if not isinstance(found, int) or isinstance(found, bool):
        return ""
    names = {number: name for name, number in FILE_TYPES.items()} | _OTHER_FILE_TYPES
    return names.get(found & ~_GUESSED, f"file type {found}")


def _settings(model: GgufReader, architecture: str) -> dict[str, Scalar]:
    settings: dict[str, Scalar] = {}
    for key in SETTINGS:
        found = model.get(f"{architecture}.{key}")
        if isinstance(found, tuple):
            settings[key] = f"{len(found):,} values"
        elif isinstance(found, str):
            settings[key] = printable(found)
        elif isinstance(found, float):
            settings[key] = float(f"{found:.7g}")  # a float32
        elif found is not None:
            settings[key] = found
    return settings


def _vocabulary(model: GgufReader) -> Vocabulary | None:
    tokens = model.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, tuple) else 0
    template = model.get("tokenizer.chat_template")
    found = _text(model, "tokenizer.ggml.model")
    return Vocabulary(found, _text(model, "tokenizer.ggml.pre"), count, isinstance(template, str)) if found else None


def _storage(model: GgufReader, architecture: str) -> tuple[StorageSummary, ...]:
    """By role where the architecture is known, and by type; roles in their usual order, large types first."""
    totals: dict[tuple[str, str], list[int]] = {}
    role_of = KNOWN_GGUF[architecture].roles(model) if architecture in KNOWN_GGUF else _no_role
    for name, entry in model.tensors.items():
        role = role_of(name)
        total = totals.setdefault((UNKNOWN_ROLE if role is None else role.value, entry.kind), [0, 0, 0])
        for place, amount in enumerate((1, math.prod(entry.shape), entry.nbytes)):
            total[place] += amount
    order = {role.value: place for place, role in enumerate(Role)}
    ordered = sorted(totals.items(), key=lambda item: (order.get(item[0][0], len(order)), -item[1][2]))
    return tuple(StorageSummary(role, kind, *total) for (role, kind), total in ordered)


def _no_role(_: str) -> Role | None:
    return None


# ------------------------------------------------------------------------------------------------------ what is unusual


def _general_lines(model: GgufReader, architecture: str) -> list[str]:
    lines: list[str] = []
    if not architecture:
        lines.append("no general.architecture: llama.cpp refuses the file.")
    kind = model.get("general.type")
    if kind not in (None, "model"):
        lines.append(f"general.type is {printable(repr(kind))}, not a whole model.")
    return lines


def _vocabulary_lines(model: GgufReader, architecture: str, vocabulary: Vocabulary | None) -> list[str]:
    if vocabulary is None or vocabulary.model == "no_vocab":
        return ["no tokenizer: llama.cpp takes and gives only token numbers."]
    lines: list[str] = []
    if not vocabulary.tokens:
        lines.append("the tokenizer has no tokens.")
    if vocabulary.model == "gpt2" and not vocabulary.pre:
        lines.append("no tokenizer.ggml.pre: llama.cpp cuts text by a rule that fits few models.")
    if vocabulary.model == "gpt2" and model.get("tokenizer.ggml.merges") is None:
        lines.append("no tokenizer.ggml.merges: llama.cpp cannot tokenise.")
    table = model.tensors.get("token_embd.weight")
    if architecture and vocabulary.tokens and table is not None and table.shape[0] != vocabulary.tokens:
        lines.append(f"the tokenizer has {vocabulary.tokens:,} tokens, token_embd.weight {table.shape[0]:,} rows.")
    return lines


def _layer_lines(model: GgufReader, architecture: str) -> list[str]:
    """Layers without any tensor, and layers beyond the last."""
    count = model.get(f"{architecture}.block_count")
    if not isinstance(count, int) or isinstance(count, bool):
        return [f"{architecture}.block_count is missing: llama.cpp does not load the file."] if architecture else []
    present = {int(match[1]) for name in model.tensors if (match := _BLOCK.match(name))}
    missing = [f"blk.{layer}" for layer in range(min(count, _LISTED_LAYERS)) if layer not in present]
    beyond = [f"blk.{layer}" for layer in sorted(present) if layer >= count]
    lines = [counted("layers without any tensor", missing)] if missing else []
    if beyond:
        lines.append(f"{counted('layers beyond the last', beyond)} ({architecture}.block_count is {count:,}).")
    return lines


def _type_lines(model: GgufReader) -> list[str]:
    """Types that hurt, or that quantkit cannot read."""
    delicate = [
        name for name, entry in model.tensors.items() if entry.kind != "F32" and not is_quantised(name, entry.shape)
    ]
    lines = [counted("norms, biases or routers that are not float32", delicate)] if delicate else []
    unread: dict[str, list[str]] = {}
    for name, entry in model.tensors.items():
        if entry.kind not in _DECODED:
            unread.setdefault(entry.kind, []).append(name)
    return lines + [
        counted(f"tensors in {kind}, which quantkit cannot decode", names) for kind, names in unread.items()
    ]
