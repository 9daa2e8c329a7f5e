"""Which shards a folder has, by its index or by their names; and small files that are read whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import INDEX_NAME, as_strings, parse_json_object, printable
from quantkit.formats.storage import open_regular

SINGLE_NAME = "model.safetensors"
MAX_JSON_BYTES = 50_000_000
"""Bound on an index or a config that is read whole. V3's index has about 9 MB."""
MAX_SHARDS = 10_000
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")


def read_index(directory: Path) -> dict[str, str]:
    """The ``weight_map`` of the folder's index: tensor name -> shard name. Reads no shard.

    Raises `SourceError` if it is absent or malformed, or a shard is not a plain file name (a path could leave the
    folder).
    """
    path = directory / INDEX_NAME
    weight_map = as_strings(parse_json_object(read_small(path), str(path)).get("weight_map"))
    if not weight_map:
        raise SourceError(f"{path}: needs a non-empty weight_map of tensor name -> shard name.")
    plain = {file for file in set(weight_map.values()) if _is_plain_name(file)}
    for name, file in weight_map.items():
        if file not in plain:
            found = f"points to {printable(repr(file))}"
            needed = "a plain name of a .safetensors file in the same folder"
            raise SourceError(f"{path}: {printable(name)}: {found}, {needed} was needed.")
    return weight_map


def read_small(path: Path) -> bytes:
    """A whole config or index. Raises `SourceError` if it is missing, no regular file, or absurdly large."""
    fd, size = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        if size > MAX_JSON_BYTES:
            raise SourceError(f"{path}: has {size:,} bytes, at most {MAX_JSON_BYTES:,} are allowed.")
        try:
            return file.read(MAX_JSON_BYTES)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error


def _weight_map(directory: Path) -> dict[str, str] | None:
    if not directory.is_dir():
        hint = (
            "Give the folder of a downloaded checkpoint."
            if not directory.exists()
            else "Give the folder that holds it."
        )
        raise SourceError(f"{printable(str(directory))}: is not a folder.", hint=hint)
    # lexists: a dangling link must be reported, not taken for "there is no index".
    return read_index(directory) if os.path.lexists(directory / INDEX_NAME) else None


def listed_shards(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the shards, and the index's weight_map if there is one. Raises `SourceError` as `read_index` does."""
    weight_map = _weight_map(directory)
    return _files_without_index(directory) if weight_map is None else sorted(set(weight_map.values())), weight_map


def _is_plain_name(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and file.isprintable()
        and not set(file) & set("/\\:")
        and not file.startswith(".")
    )


def _files_without_index(directory: Path) -> list[str]:
    """The single file, or every shard. Numbered shards must be complete: no index can tell what a missing one held."""
    if os.path.lexists(directory / SINGLE_NAME):
        return [SINGLE_NAME]
    files = sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    if not files:
        raise SourceError(
            f"{directory}: holds no *.safetensors file.", hint="Give the folder of a downloaded checkpoint."
        )
    present = set(files)
    numbered = filter(None, map(_NUMBERED.fullmatch, files))
    series = {(match[1], len(match[2]), match[3]) for match in numbered}
    for prefix, digits, total in sorted(series):
        for i in range(1, min(int(total), MAX_SHARDS) + 1):
            missing = f"{prefix}{i:0{digits}d}-of-{total}.safetensors"
            if missing not in present:
                raise SourceError(f"{directory}: shard {printable(missing)} is missing and there is no {INDEX_NAME}.")
    return files
