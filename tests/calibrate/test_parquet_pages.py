"""Pages of parquet files by their headers: those that pyarrow writes, and files that are made to fill the memory."""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate import parquet_rows as parquet_rows_module
from quantkit.calibrate.documents import TextFile, read_documents
from quantkit.calibrate.parquet_pages import Page, PageError, pages
from quantkit.calibrate.parquet_rows import parquet_rows
from quantkit.errors import CalibrationError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = [f"{number} " * 50 for number in range(1000)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": None}] for text in TEXTS]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none", "use_dictionary": False},
    "snappy": {"compression": "snappy", "use_dictionary": False},
    "zstd": {"compression": "zstd"},
    "gzip": {"compression": "gzip", "data_page_version": "2.0"},
    "small pages": {"data_page_size": 100, "write_batch_size": 10, "use_dictionary": False, "compression": "none"},
    "groups of rows": {"row_group_size": 70},
    "page index": {"write_page_index": True, "write_statistics": True},
    "checksums": {"write_page_checksum": True},
}


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(arrow.table(columns), path, **options)
    return path


def pages_of(path: Path) -> list[Page]:
    with path.open("rb") as file:
        return list(pages(file.fileno()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [{"text": TEXTS}, {"messages": CHATS, "id": range(1000)}], ids=["texts", "chats"])
def test_pages_fill_the_column_chunks(columns: dict[str, Any], form: str, tmp_path: Path) -> None:
    """With their headers, stored and unpacked, they are what the footer says of the row groups."""
    path = written(tmp_path / "a.parquet", columns, **FORMS[form])
    found = pages_of(path)
    metadata = parquet.ParquetFile(path).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    headers = sum(chunk.total_compressed_size for chunk in chunks) - sum(page.stored for page in found)
    assert 10 * len(found) <= headers <= 1000 * len(found)  # with statistics
    assert sum(chunk.total_uncompressed_size for chunk in chunks) - headers == sum(page.unpacked for page in found)
    assert len(found) >= len(chunks)
    if form == "plain":
        assert all(page.stored == page.unpacked for page in found)
    assert len(list(parquet_rows("a", path, None))) == 1000


def test_a_page_header_longer_than_the_first_look(tmp_path: Path) -> None:
    """Statistics of long texts are in it."""
    texts = ["a" * 4000, "b" * 4000]
    path = written(tmp_path / "a.parquet", {"text": texts}, use_dictionary=False, compression="none")
    assert sum(page.unpacked for page in pages_of(path)) > 8000
    assert [row["text"] for _, row in parquet_rows("a", path, None)] == texts


@pytest.mark.parametrize("compression", ["zstd", "gzip", "brotli"])
def test_a_page_that_unpacks_to_far_more_is_refused_and_not_unpacked(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = {"text": ["x" * 40_000_000]}
    path = written(tmp_path / "a.parquet", column, compression=compression, use_dictionary=False)
    monkeypatch.delattr(parquet, "ParquetFile")
    with pytest.raises(CalibrationError, match=r"a\.parquet: a page of .* bytes unpacks to 40,000,0.*") as refused:
        read_documents(TextFile("a.parquet", path))
    assert "\n" not in refused.value.message
    assert "Convert it to .jsonl" in refused.value.hint


def test_a_large_page_of_real_text_is_read(tmp_path: Path) -> None:
    text = "".join(f"{number} " for number in range(5_500_000))
    assert len(text) > 40_000_000
    path = written(tmp_path / "a.parquet", {"text": [text]}, compression="zstd", use_dictionary=False)
    ((number, row),) = parquet_rows("a", path, None)
    assert (number, row["text"] == text) == (1, True)


def test_more_pages_than_writers_make_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows_module, "_MAX_PAGES", 10)
    path = written(tmp_path / "a.parquet", {"text": TEXTS}, row_group_size=50)
    with pytest.raises(CalibrationError, match="has more than 10 pages"):
        read_documents(TextFile("a.parquet", path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PAR1",
        b"PAR1" + bytes(50),
        b"PAR1\xff\xff\xff\xffPAR1",
        b"PAR1" + b"\x49" * 100 + (100).to_bytes(4, "little") + b"PAR1",
        b"PAR1" + b"\x1c" * 100 + (100).to_bytes(4, "little") + b"PAR1",
    ],
)
def test_what_is_no_parquet_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(PageError):
        pages_of(tmp_path / "a.parquet")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_headers_end_in_a_page_error_or_in_pages(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("damaged") / "a", {"text": TEXTS[:20]}, row_group_size=5)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    found: list[Page] = []
    with path.open("rb") as file, suppress(PageError):
        found.extend(islice(pages(file.fileno()), 10_000))
    assert all(page.stored >= 0 and page.unpacked >= 0 for page in found)


def test_a_footer_of_many_columns_is_gone_through_in_time(tmp_path: Path) -> None:
    """The largest that is looked at, full of the smallest lists."""
    size = 1 << 21
    footer = b"\x49\xfc" + b"\x80\x80\x7f" + b"\x19\x0c\x00" * ((size - 5) // 3)
    footer += bytes(size - len(footer))
    (tmp_path / "a").write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    start = time.process_time()
    with pytest.raises(PageError):
        pages_of(tmp_path / "a")
    assert time.process_time() - start < 5
