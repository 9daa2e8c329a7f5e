"""Shards of a folder that cannot be opened."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import read_shard
from quantkit.formats.safetensors.index import listed_shards


def unreadable_shards(directory: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Shards without a sound header, by file: what is wrong, and the tensors that the index expects there. Raises
    `SourceError` for a folder without shards, or a damaged index."""
    files, weight_map = listed_shards(directory)
    problems = {file: _header_problem(directory / file) for file in files}
    expected = (weight_map or {}).items()
    return {
        file: (problem, tuple(name for name, own in expected if own == file))
        for file, problem in problems.items()
        if problem
    }


def _header_problem(path: Path) -> str:
    try:
        read_shard(path)
    except SourceError as error:
        return error.message
    return ""
