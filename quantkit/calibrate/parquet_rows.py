"""The rows of a parquet file of text, or of chats, in little memory: a hostile file is refused and not unpacked.

Enters: a file, the column that names domains. Leaves: rows as their JSON was. Needs pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from quantkit.calibrate.parquet_pages import PageError, pages
from quantkit.errors import CalibrationError
from quantkit.formats.safetensors.header import printable

_MAX_EXPANSION = 100
"""Bytes of text, and of what a row takes in memory, for each byte of a parquet file: repeated texts are stored once."""
_MAX_PAGE_EXPANSION = 20
"""Unpacked bytes for each byte of a page that is larger than `_SMALL_TEXT`. pyarrow holds a page as a whole."""
_SMALL_TEXT = 32_000_000
_MAX_PAGES = 200_000
"""Writers make pages of a megabyte, or of 20,000 rows."""
_ROW_BYTES = 200
_HINT = "Such a file is damaged, or made to fill the memory. Convert it to .jsonl if it is neither."
_CHAT_COLUMNS = ("messages", "tools", "documents", "chat_template_kwargs")


def importable() -> bool:
    """Whether there is a pyarrow."""
    return find_spec("pyarrow") is not None


def parquet_rows(label: str, path: Path, domain_key: str | None) -> Iterator[tuple[int, dict[str, object]]]:
    """Number, from 1 on, and content of each row: a column `text`, or `messages` and those beside it, and the domain's.

    Raises `CalibrationError`, which begins with ``label``, for a file that cannot be read, is not text, or unpacks to
    far more than its size.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    left = most = max(_SMALL_TEXT, _MAX_EXPANSION * path.stat().st_size)
    try:
        columns = _columns(label, domain_key, parquet.read_schema(path).names)
        _check_pages(label, path)
        texts = "text" in columns
        # Read as a dictionary, a repeated text stays one object until its row is asked for.
        with parquet.ParquetFile(path, read_dictionary=columns if texts else None) as table:
            if any(size > most for size in _group_sizes(table.metadata)):
                raise _expands(label, most)
            for batch in table.iter_batches(batch_size=1024 if texts else 8, columns=columns):
                for place in range(batch.num_rows):
                    row = {name: batch.column(name)[place].as_py() for name in columns}
                    number += 1
                    left -= _ROW_BYTES + _n_characters(row)
                    if left < 0:
                        raise _expands(label, most)
                    yield number, _without_nulls(row)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{label}: a text behind row {number} is not UTF-8 ({error.reason}).") from error
    except (arrow.ArrowException, OSError, PageError) as error:
        problem = printable(str(error).splitlines()[0])
        raise CalibrationError(f"{label}: is not readable as parquet ({problem}).") from error


def _check_pages(label: str, path: Path) -> None:
    """Raise `CalibrationError` for a page that says that it unpacks to far more than it is."""
    with path.open("rb") as handle:
        for number, page in enumerate(pages(handle.fileno())):
            most = max(_SMALL_TEXT, _MAX_PAGE_EXPANSION * page.stored)
            if page.unpacked > most:
                raise CalibrationError(
                    f"{label}: a page of {page.stored:,} bytes unpacks to {page.unpacked:,}, more than {most:,}.",
                    hint=_HINT,
                )
            if number >= _MAX_PAGES:
                raise CalibrationError(f"{label}: has more than {_MAX_PAGES:,} pages.", hint=_HINT)


def _group_sizes(metadata: Any) -> Iterator[int]:
    """Bytes that each group of rows has without compression, as the file says."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield group.total_byte_size  # what a column says of itself ends the process, if it contradicts its schema


def _n_characters(value: object) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, dict):
        return sum(map(_n_characters, cast("dict[str, object]", value).values()))
    if isinstance(value, list):
        return sum(map(_n_characters, cast("list[object]", value)))
    return len(value) if isinstance(value, str) else 0


def _expands(label: str, most: int) -> CalibrationError:
    return CalibrationError(
        f"{label}: holds more than {most:,} bytes of text and rows, over {_MAX_EXPANSION} times its own size.",
        hint=_HINT,
    )


def _columns(label: str, domain_key: str | None, names: Sequence[str]) -> list[str]:
    domain = () if domain_key is None else (domain_key,)
    missing = [name for name in domain if name not in names]
    if not missing and "messages" in names:
        return [name for name in (*_CHAT_COLUMNS, *domain) if name in names]
    if not missing and "text" in names:
        return list(dict.fromkeys(("text", *domain)))
    needed = f"`{missing[0]}`" if missing else "`text` or `messages`"
    raise CalibrationError(f"{label}: found columns {printable(', '.join(names))}, needed {needed}.")


def _without_nulls(row: Mapping[str, object]) -> dict[str, object]:
    """The row as its JSON was: in a column all objects have the same keys, those that one lacks are null."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        entries = cast("dict[str, object]", value)
        return {key: _plain(entry) for key, entry in entries.items() if entry is not None or key == "content"}
    return [_plain(item) for item in cast("list[object]", value)] if isinstance(value, list) else value
