"""GGUF files beside a config.json: whether they are that model, and how they open as the source of a conversion.

GGUF has no config.json and no tokenizer files. Both are taken from a folder that the user names, or that holds the
file; config.json is what the output is made by, and no key of the file may contradict it.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from quantkit.arch import arch_of
from quantkit.arch.base import GgufReading, ModelArch
from quantkit.arch.parts import stored_tensors
from quantkit.errors import ConfigError, SourceError
from quantkit.formats.gguf.model_source import GgufModelSource
from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.gguf.vocabulary import token_texts
from quantkit.formats.model_source import ModelSource, open_source
from quantkit.formats.safetensors.header import printable
from quantkit.formats.source import read_config
from quantkit.formats.storage import LOCAL, Storage
from quantkit.formats.tiktoken_model import tokenizer_file
from quantkit.tensors import Role

MAX_OTHER_TOKENS = 0.01
"""Of a vocabulary, tokens that may have another text in the file: converters rename a few that are special."""


def is_gguf_model(path: Path) -> bool:
    """Whether a path is a .gguf file, or a folder that holds some and no safetensors."""
    if path.is_dir():
        return not any(path.glob("*.safetensors")) and any(path.glob("*.gguf"))
    return path.suffix == ".gguf" and path.is_file()


def config_folder(source: Path, config: Path | None) -> Path:
    """The folder of config.json and tokenizer: ``config``, or the one that ``source`` is or lies in. Raises
    `SourceError` for a ``config`` beside a source that has its own, and for GGUF without one."""
    if not is_gguf_model(source):
        if config is not None and source.exists():
            raise SourceError(
                f"--config {printable(str(config))}: is for GGUF files, and {printable(str(source))} is none.",
                hint="Leave --config out: the folder of a checkpoint has its own config.json.",
            )
        return source
    folder = config or (source if source.is_dir() else source.parent)
    if config is not None and not config.is_dir():
        raise SourceError(
            f"--config {printable(str(config))}: is no folder.",
            hint="Give the folder that holds the original's config.json and tokenizer.",
        )
    _refuse_missing(folder / "config.json")
    return folder


def open_model(source: Path, config: Path | None = None, storage: Storage = LOCAL) -> ModelSource:
    """Open what is to be converted: a checkpoint's folder, whose shards ``storage`` opens, or GGUF with the folder that
    `config_folder` says.

    Raises `SourceError` and `ConfigError` as `open_source` does, and for GGUF that is damaged, lacks its config.json or
    tokenizer, or is another model than config.json says. What config.json says is looked at first.
    """
    folder = config_folder(source, config)
    if is_gguf_model(source):
        return _open_gguf(source, folder)
    arch_of(read_config(folder))  # before the weights: those of unknown families may be stored in unknown ways
    return open_source(folder, storage)


def _open_gguf(path: Path, folder: Path) -> ModelSource:
    with GgufReader(path) as reader:
        _refuse_missing(tokenizer_file(folder))
        config = read_config(folder)
        arch = arch_of(config)
        reading = read_as(reader, arch)
        _refuse_unknown(reader, arch, reading)
        _refuse_other_tokens(reader, folder, arch)
    model = arch.gguf()
    names = {spec.name: model.stored_name(spec.name) for spec in reading.specs}
    return GgufModelSource(path, names, tuple(arch.parts().values()), folder, config, _notes(arch, reading))


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise SourceError(
            f"{printable(str(path))}: no such file; GGUF has no config.json and no tokenizer files.",
            hint="Give --config DIR: the folder of the original's config.json and tokenizer.",
        )


def _notes(arch: ModelArch, reading: GgufReading) -> tuple[str, ...]:
    """What config.json describes and the file lacks, a line each."""
    notes: list[str] = []
    if reading.notes:
        notes.append(
            f"The GGUF file lacks {len(reading.notes)} keys of its model, for which llama.cpp takes other values: "
            "those of config.json are taken."
        )
    if arch.variants().carried:
        notes.append("GGUF holds the language model alone: outputs have no vision tower.")
    return tuple(notes)


def read_as(reader: GgufReader, arch: ModelArch) -> GgufReading:
    """What llama.cpp runs of a file that is to be this model. Raises `SourceError` for keys that contradict it, and
    for tensors that are missing or of another shape, MTP layers' apart."""
    model = arch.gguf()
    reading = _reading(reader, arch)
    specs = [spec for spec in reading.specs if spec.role is not Role.MTP]
    for stored in stored_tensors(specs, model).values():
        entry = reader.tensors.get(stored.name)
        hint = f"See: quantkit inspect {reader.path}"
        if entry is None:
            line = f"{reader.path}: lacks the tensor {stored.name}, which config.json describes."
            raise SourceError(line, hint=hint)
        if entry.shape != stored.shape:
            raise SourceError(
                f"{reader.path}: {stored.name} has shape {list(entry.shape)}, config.json describes "
                f"{list(stored.shape)}.",
                hint=hint,
            )
    return reading


def _reading(reader: GgufReader, arch: ModelArch) -> GgufReading:
    model, key = arch.gguf(), "general.architecture"
    found, needed = reader.get(key), model.key_values(mtp=False)[key]
    if reader.get("general.type") == "imatrix":
        raise SourceError(
            f"{reader.path}: is an imatrix file, a model was needed.",
            hint="Give the model itself; recipes take an imatrix as `imatrix:`.",
        )
    if found != needed:
        raise SourceError(
            f"{reader.path}: {key} is {printable(repr(found))}, config.json needs {needed!r}.",
            hint="It is another model.",
        )
    try:
        return model.read(reader.get)
    except (SourceError, ConfigError) as error:
        raise SourceError(f"{reader.path}: {error.message}", hint=error.hint) from None


def _refuse_unknown(reader: GgufReader, arch: ModelArch, reading: GgufReading) -> None:
    """Raise for tensors of which nothing would be left. A whole kv_b_proj beside its parts is in old files."""
    model = arch.gguf()
    known = {model.stored_name(spec.name)[0] for spec in (*reading.specs, *arch.tensors())} | {*model.constants()}
    unknown = [name for name in reader.tensors if name not in known]
    if unknown:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise SourceError(
            f"{reader.path_of(unknown[0])}: {printable(unknown[0])}{more}: config.json's model has no such tensor.",
            hint="config.json belongs to another model.",
        )


def _refuse_other_tokens(reader: GgufReader, folder: Path, arch: ModelArch) -> None:
    """Raise if the folder's tokenizer is another one than the file's."""
    stored = reader.get("tokenizer.ggml.tokens")
    if not isinstance(stored, tuple):
        return
    found = token_texts(folder, arch.vocab_size)
    other = [number for number, (one, two) in enumerate(zip(found, stored, strict=False)) if one != two]
    if len(found) == len(stored) and len(other) <= MAX_OTHER_TOKENS * len(found):
        return
    where = f"{len(stored):,} tokens" if len(found) != len(stored) else f"{cast('str', stored[other[0]])!r:.40}"
    held = f"{len(found):,}" if len(found) != len(stored) else f"{found[other[0]]!r:.40} for token {other[0]:,}"
    raise SourceError(
        f"{tokenizer_file(folder)}: has {held}, {reader.path} has {where}.",
        hint="The tokenizer belongs to another model: give --config DIR, the folder of this model's original.",
    )
