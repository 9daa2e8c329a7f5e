"""The small files around the weights that go along into an output: which they are, whether they can be copied.

`check_side_files` is asked before hours of work, `copy_side_files` after them; both read a file in the same way.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from quantkit.errors import SourceError
from quantkit.formats.preallocated import write_durably
from quantkit.formats.safetensors.header import LFS_START, check_json_size, first_word, printable
from quantkit.formats.storage import open_regular

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
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


def check_side_files(source_directory: Path, patterns: tuple[str, ...] = SIDE_FILES) -> None:
    """Raise `SourceError` for a file that `copy_side_files` could not copy, or that no runtime could read: a link that
    leads nowhere, a git-lfs pointer, JSON that is none."""
    for name in _side_files(source_directory, patterns):
        raw = _read_side_file(source_directory / name)
        if name.endswith(".json"):
            _check_json(source_directory / name, raw)


def copy_side_files(source_directory: Path, directory: Path, patterns: tuple[str, ...] = SIDE_FILES) -> list[str]:
    """Copy tokenizer, chat template, generation config, code and licence files (or what ``patterns`` match); returns
    their names, sorted.

    Links are followed to regular files, wherever they are; a larger file than 100 MB is refused. Raises `SourceError`
    naming the file, `OutputError` if it cannot be written.
    """
    names = _side_files(source_directory, patterns)
    for name in names:
        write_durably(directory / name, _read_side_file(source_directory / name))
    return names


def side_file_bytes(source_directory: Path) -> int:
    """Size of what `copy_side_files` would copy. Files that cannot be copied count nothing: `check_side_files` refuses
    them."""
    with suppress(OSError):
        paths = [source_directory / name for name in _side_files(source_directory, SIDE_FILES)]
        return sum(path.stat().st_size for path in paths if path.is_file())
    return 0


def folder_notes(source_directory: Path) -> tuple[str, ...]:
    """What the outputs of a source will lack, one line each: tokenizer, chat template, sub-folders."""
    notes: list[str] = []
    entries = sorted(source_directory.iterdir())
    names = {path.name for path in entries}
    if not names.intersection(TOKENIZERS):
        notes.append("The source has no tokenizer files: outputs have none, runtimes cannot serve text from them.")
    elif not has_chat_template(source_directory):
        notes.append("The source has no chat template: outputs have none, runtimes refuse chats or guess the format.")
    folders = [path.name for path in entries if path.is_dir() and not path.name.startswith(".")]
    if folders:
        shown = ", ".join(f"{printable(name, 60)}/" for name in folders[:5])
        more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
        notes.append(f"Sub-folders of the source are not copied: {shown}{more}.")
    return tuple(notes)


def has_chat_template(source_directory: Path) -> bool:
    """Whether the folder has one, in a file of its own or in tokenizer_config.json."""
    if any((source_directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = source_directory / "tokenizer_config.json"
    if not path.is_file():
        return False
    raw = _read_side_file(path)
    check_json_size(raw, str(path))
    try:
        settings: object = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False  # `check_side_files` says what is wrong with it
    return isinstance(settings, dict) and bool(cast("Mapping[str, object]", settings).get("chat_template"))


def _side_files(source_directory: Path, patterns: tuple[str, ...]) -> list[str]:
    entries = source_directory.iterdir()
    return sorted(path.name for path in entries if _is_side_file(path.name, patterns) and not path.is_dir())


def _is_side_file(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in NOT_SIDE_FILES
    )


def _read_side_file(path: Path) -> bytes:
    if path.is_symlink() and not path.exists():
        raise SourceError(
            f"{path}: is a link that leads nowhere ({printable(str(path.readlink()))}).",
            hint="Fetch the file, or remove the link.",
        )
    fd, size = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        if size > MAX_SIDE_FILE_BYTES:
            raise SourceError(
                f"{path}: has {size:,} bytes, at most {MAX_SIDE_FILE_BYTES:,} are copied.",
                hint="If the model needs it, copy it yourself afterwards; move it out of the folder now.",
            )
        try:
            raw = file.read(MAX_SIDE_FILE_BYTES)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error
    if raw.startswith(LFS_START):
        raise SourceError(
            f"{path}: is a git-lfs pointer, not the file.", hint="Run `git lfs pull` in the checkpoint's folder."
        )
    return raw


def _check_json(path: Path, raw: bytes) -> None:
    check_json_size(raw, str(path))
    try:
        json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        word = first_word(raw)
        found = f"begins with {word!r}" if word and word[0] not in '{["' else printable(str(error))
        raise SourceError(f"{path}: is not sound JSON ({found}).", hint="Fetch the file again.") from None
