"""The small files around the weights: config.json, tokenizer and generation files, and the model card.

config.json is copied as the source has it, key by key in its order; only what the conversion changed is replaced.
Configs rebuilt by a library lose keys that decide about the computation (scoring_func, topk_method).
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.model_card import CardFacts, model_card
from quantkit.formats.preallocated import write_durably

__all__ = ["CardFacts", "copy_side_files", "model_card", "write_config", "write_model_card"]

LICENCE_FILES = ("LICENSE*", "NOTICE*")
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "*.py",
    "*.model",
    "*.tiktoken",
    *LICENCE_FILES,
)
"""What goes along. Weights, their index and config.json never match; README.md is written anew."""
NOT_SIDE_FILES = ("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")
MAX_SIDE_FILE_BYTES = 100_000_000


def write_config(
    directory: Path,
    source_config: Mapping[str, object],
    quantization_config: Mapping[str, object],
    *,
    mtp_dropped: bool = False,
) -> None:
    """Write config.json: the raw source config with ``quantization_config`` replaced (removed if empty), in the
    source's key order.

    If the MTP layers were dropped, num_nextn_predict_layers becomes 0, else vLLM would look for them. Raises
    `OutputError`.
    """
    config = dict(source_config)
    config.pop("compression_config", None)  # the section's name in old files
    if quantization_config:
        config["quantization_config"] = dict(quantization_config)
    else:
        config.pop("quantization_config", None)
    if mtp_dropped and "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = 0
    write_durably(directory / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def copy_side_files(source_directory: Path, directory: Path, patterns: tuple[str, ...] = SIDE_FILES) -> list[str]:
    """Copy tokenizer, chat template, generation config, code and licence files (or what ``patterns`` match); returns
    their names, sorted.

    Only regular files of the folder itself, or links to files inside it (or inside the blob store that a hub cache
    keeps beside it); a larger file than 100 MB is refused. Raises `SourceError` naming the file, `OutputError` if it
    cannot be written.
    """
    entries = source_directory.iterdir()
    names = sorted(path.name for path in entries if _is_side_file(path.name, patterns) and not path.is_dir())
    for name in names:
        write_durably(directory / name, _read_side_file(source_directory, name))
    return names


def side_file_bytes(source_directory: Path) -> int:
    """Size of what `copy_side_files` would copy. Files that cannot be copied count nothing: that is refused
    elsewhere."""
    total = 0
    with suppress(OSError):
        for path in source_directory.iterdir():
            if _is_side_file(path.name, SIDE_FILES) and path.is_file():
                total += path.stat().st_size
    return total


def _is_side_file(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in NOT_SIDE_FILES
    )


def _read_side_file(source_directory: Path, name: str) -> bytes:
    path = source_directory / name
    try:
        target = path.resolve(strict=True)
        if not any(target.is_relative_to(folder) for folder in _allowed_folders(source_directory)):
            raise SourceError(
                f"{path}: is a link that leads out of the checkpoint's folder.", hint="Replace it by the file itself."
            )
        fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{path}: is no regular file.")
            if status.st_size > MAX_SIDE_FILE_BYTES:
                raise SourceError(f"{path}: has {status.st_size:,} bytes, at most {MAX_SIDE_FILE_BYTES:,} are copied.")
            return file.read(MAX_SIDE_FILE_BYTES)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error


def _allowed_folders(source_directory: Path) -> list[Path]:
    """The folder, and for a hub cache (``models--X/snapshots/REVISION``) the blobs that its links point to."""
    resolved = source_directory.resolve()
    folders = [resolved]
    if resolved.parent.name == "snapshots":
        folders.append(resolved.parent.parent / "blobs")
    return folders


def write_model_card(directory: Path, facts: CardFacts) -> None:
    """Write README.md. Raises `OutputError`."""
    write_durably(directory / "README.md", model_card(facts).encode())
