"""A checkpoint to be evaluated, of any format that can be decoded: what it is follows from its files.

A candidate must be the reference's model: same layers, width, vocabulary and tensor shapes. A folder computes by its
own config.json; a GGUF file by the reference's, which its metadata must not contradict, with llama.cpp's defaults for
keys that it lacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.documents.evaluation import CheckpointFacts
from quantkit.errors import ConfigError, QuantkitError, SourceError
from quantkit.formats.folder import FolderSource
from quantkit.formats.fp8_source import Fp8Source
from quantkit.formats.gguf.header import is_gguf
from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.gguf.source import GgufSource
from quantkit.formats.layouts import READERS
from quantkit.formats.safetensors.header import printable
from quantkit.formats.source import checkpoint_name, open_plain, quant_method, read_config
from quantkit.formats.storage import LOCAL, Storage
from quantkit.formats.tiktoken_model import tokenizer_file
from quantkit.plan.gguf_model import read_as
from quantkit.tensors import Role, RowSource, TensorInfo, TensorSpec

READABLE = (
    "BF16, F16, F32 and FP8-block folders, compressed-tensors, GPTQ, AWQ, auto-round and bitsandbytes (NF4, FP4) "
    "folders, and GGUF can be read."
)


class OpenSource(RowSource, Protocol):
    """A source that can be closed."""

    def close(self) -> None:
        """Give the files back."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An open checkpoint, and what the document says of it. Use it in ``with``."""

    arch: ModelArch
    source: OpenSource
    facts: CheckpointFacts

    def __enter__(self) -> Evaluated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()


def open_reference(path: Path, storage: Storage = LOCAL) -> Evaluated:
    """A folder with config.json, tokenizer and weights. Raises `SourceError` or `ConfigError` with one line."""
    if not path.is_dir():
        raise SourceError(
            f"{path}: is not a folder, nor a file that --save-reference wrote.",
            hint="Give the original checkpoint's folder first, then the candidates, which may be GGUF files.",
        )
    if not _has_shards(path) and any(path.glob("*.gguf")):
        raise SourceError(
            f"{path}: holds GGUF files; the reference is a folder with config.json, tokenizer and safetensors.",
            hint="Give the original checkpoint's folder first: GGUF can be a candidate, not the reference.",
        )
    if not _has_shards(path):
        raise SourceError(f"{path}: holds no safetensors, a reference in this format was needed.", hint=READABLE)
    opened = _open_folder(path, storage)
    return _checked(opened, opened.arch)


def open_candidate(path: Path, reference: ModelArch, tokenizer: str | None, storage: Storage = LOCAL) -> Evaluated:
    """A path that exists, in any format; ``tokenizer``: what `tokenizer_sha256` says of the reference. Raises a
    `QuantkitError` with one line: none of the formats, damaged, or another model than the reference."""
    if path.is_dir() and _has_shards(path):
        opened = _open_folder(path, storage)
        return _checked(opened, reference, _tokenizer_notes(path, tokenizer))
    if (path.is_dir() and _holds_gguf(path)) or (path.is_file() and is_gguf(path)):
        return _open_gguf(path, reference)
    inside = [part for part in sorted(path.iterdir()) if _holds_model(part)] if path.is_dir() else []
    if inside:
        names = " ".join(map(str, inside[:4]))
        raise SourceError(f"{path}: is a folder of {len(inside)} outputs.", hint=f"Name those to evaluate: {names}.")
    what = "holds neither safetensors nor GGUF" if path.is_dir() else "is no GGUF file"
    raise SourceError(f"{path}: {what}.", hint=READABLE)


def _has_shards(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _holds_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf"))


def _holds_model(path: Path) -> bool:
    return path.is_dir() and (_has_shards(path) or _holds_gguf(path))


# ------------------------------------------------------------------------------------------------------------- folders


def _open_folder(path: Path, storage: Storage) -> Evaluated:
    config = read_config(path)
    method = quant_method(config)
    if method not in (None, "fp8", *READERS):
        raise SourceError(f"{path}: is quantised as {printable(repr(method))}, which cannot be read.", hint=READABLE)
    try:
        arch = arch_of(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
    if method is not None and method in READERS:
        kind, source = READERS[method].label, FolderSource(path, READERS[method], storage)
    else:
        source = open_plain(path, storage)
        kind = _stored_dtype(source, arch)
    facts = _facts(
        path,
        kind,
        source.raw.fingerprint(),
        source.infos().values(),
        sum(info.nbytes for info in source.raw.infos().values()),
    )
    return Evaluated(arch, source, facts)


def _stored_dtype(source: Fp8Source, arch: ModelArch) -> str:
    """FP8 blocks, or the dtype of the embedding."""
    if any(map(source.stored_as, source.infos())):
        return "FP8 blocks"
    embed = source.infos().get(arch.embed)
    return "safetensors" if embed is None else embed.dtype


def tokenizer_sha256(folder: Path) -> str | None:
    """sha256 (hex) of the folder's tokenizer.json or tiktoken.model, None if there is none."""
    path = tokenizer_file(folder)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _tokenizer_notes(path: Path, reference: str | None) -> list[str]:
    if None not in (own := tokenizer_sha256(path), reference) and own != reference:
        return ["Its tokenizer.json differs from the reference's, which was used."]
    return []


# ---------------------------------------------------------------------------------------------------------------- GGUF


def _open_gguf(path: Path, reference: ModelArch) -> Evaluated:
    """The model that llama.cpp runs when it is given the file: what the file does not say has llama.cpp's default."""
    with GgufReader(path) as reader:
        reference = _as_stacked(reader, reference)
        model, reading = reference.gguf(), read_as(reader, reference)
        names = {spec.name: model.stored_name(spec.name) for spec in reading.specs}
        stored_infos = [TensorInfo(e.name, e.shape, "F32") for e in reader.tensors.values()]
        facts = _facts(path, "GGUF", reader.fingerprint(), stored_infos, reader.data_bytes, reading.notes)
    return Evaluated(reading.arch, GgufSource(path, names, tuple(reference.parts().values())), facts)


def _as_stacked(reader: GgufReader, reference: ModelArch) -> ModelArch:
    """The reference with as many routed experts as the file, if that has fewer: they are stacked in one tensor."""
    experts, model = reference.routed_experts(), reference.gguf()
    first = next((spec for spec in reference.tensors() if spec.expert is not None), None)
    if experts is None or first is None:
        return reference
    entry = reader.tensors.get(model.stored_name(first.name)[0])
    fewer = entry is not None and len(entry.shape) == 3 and 0 < entry.shape[0] < experts.count
    return reference.with_experts(entry.shape[0]) if fewer and entry is not None else reference


# -------------------------------------------------------------------------------------------------------------- checks


def _facts(
    path: Path, kind: str, fingerprint: str, infos: Iterable[TensorInfo], nbytes: int, notes: Iterable[str] = ()
) -> CheckpointFacts:
    return CheckpointFacts(
        name=checkpoint_name(path),
        path=str(path),
        format=kind,
        fingerprint=fingerprint,
        weights=sum(info.numel for info in infos),
        nbytes=nbytes,
        notes=tuple(notes),
    )


def _checked(opened: Evaluated, reference: ModelArch, notes: Iterable[str] = ()) -> Evaluated:
    """The checkpoint, if it is complete and of the reference's shape; closed and refused otherwise."""
    path = Path(opened.facts.path)
    try:
        for what in ("n_layers", "hidden_size", "vocab_size"):
            found, needed = getattr(opened.arch, what), getattr(reference, what)
            if found != needed:
                raise SourceError(
                    f"{path}: has {what} {found:,}, the reference has {needed:,}: it is another model.",
                )
        infos = opened.source.infos()
        for spec in _needed(_as_pruned(reference, opened.arch)):
            info = infos.get(spec.name)
            _check_shape(path, spec.name, None if info is None else info.shape, spec.shape)
    except QuantkitError:
        opened.source.close()
        raise
    return Evaluated(
        opened.arch, opened.source, opened.facts.model_copy(update={"notes": (*opened.facts.notes, *notes)})
    )


def _as_pruned(reference: ModelArch, found: ModelArch) -> ModelArch:
    """The reference with as many routed experts as a candidate, if that has fewer."""
    ours, theirs = reference.routed_experts(), found.routed_experts()
    fewer = ours is not None and theirs is not None and theirs.count < ours.count
    return reference.with_experts(theirs.count) if fewer and theirs is not None else reference


def _needed(arch: ModelArch) -> Iterable[TensorSpec]:
    return (spec for spec in arch.tensors() if spec.role is not Role.MTP)


def _check_shape(path: Path, name: str, found: tuple[int, ...] | None, needed: tuple[int, ...], hint: str = "") -> None:
    if found is None:
        raise SourceError(f"{path}: lacks the tensor {name}, which the reference's config.json describes.", hint=hint)
    if found != needed:
        raise SourceError(
            f"{path}: {name} has shape {list(found)}, the reference's config.json describes {list(needed)}."
        )


def names_by_layer(arch: ModelArch) -> Mapping[int, list[str]]:
    """Official names of each decoder layer's tensors, for reading ahead."""
    names: dict[int, list[str]] = {}
    for spec in _needed(arch):
        if spec.layer is not None:
            names.setdefault(spec.layer, []).append(spec.name)
    return names
