"""Text that would fail a conversion fails its plan; rows that repeat themselves are reported."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.calibrate import dataset
from quantkit.calibrate.dataset import Calibration, check_text, eval_windows, token_rows
from quantkit.calibrate.documents import builtin_dir
from quantkit.errors import CalibrationError
from tests.calibrate.byte_checkpoint import N_IDS, numbered, rows_of, write, write_checkpoint

BAD_TEXTS = {
    "empty.txt": b"",
    "latin.txt": b"caf\xe9 au lait",
    "split.txt": b"x" * ((1 << 20) - 1) + b"\xc3",  # a character that the end of the file cuts
    "split.jsonl": b'{"text": "a"}\n{"text": "\xff"}',
    "blank.jsonl": b'\n{"text": " "}\n',
    "bad.jsonl": b'{"text": "a"}\n{',
    "short.txt": b"short",
    "escape.jsonl": b'{"\\u001b[2J\\u0000": 1}',
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def calibration(*data: str, tokens: int = 64, length: int = 32) -> Calibration:
    return Calibration(data=data, tokens=tokens, sequence_length=length)


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_the_error_is_that_of_the_conversion(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD_TEXTS[name])
    found: list[str] = []
    for work in (
        lambda: check_text(calibration(name), checkpoint, tmp_path),
        lambda: token_rows(calibration(name), checkpoint, tmp_path),
        lambda: check_text([name], checkpoint, tmp_path, 32),
        lambda: eval_windows([name], 32, checkpoint, tmp_path),
    ):
        with pytest.raises(CalibrationError) as caught:
            work()
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert all(message.isprintable() for message in found)


def test_offsets_count_from_the_first_byte(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa\xe9")
    (tmp_path / "late.txt").write_bytes(b"x" * ((1 << 20) + 5) + b"\xe9 ")
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}')
    for name, offset in {"bom.txt": 4, "late.txt": (1 << 20) + 5, "line.jsonl": 24}.items():
        with pytest.raises(CalibrationError, match=f"{name}: is not UTF-8 .byte 0xe9 at offset {offset}"):
            check_text([name], checkpoint, tmp_path)


def test_enough_text_passes_and_one_token_more_does_not(checkpoint: Path, tmp_path: Path) -> None:
    names = [write(tmp_path / f"{letter}.txt", numbered(100, letter)) for letter in "ab"]
    check_text(calibration(*names, tokens=38 * 32), checkpoint, tmp_path)
    with pytest.raises(CalibrationError, match="1,217 tokens were asked for, the text holds 1,216 in whole rows of 32"):
        check_text(calibration(*names, tokens=38 * 32 + 1), checkpoint, tmp_path)
    check_text(names, checkpoint, tmp_path, 601)
    with pytest.raises(CalibrationError, match="a.txt: holds 600 tokens, one window needs 601"):
        check_text(names, checkpoint, tmp_path, 602)


def test_no_more_is_tokenised_than_tells_that_there_is_enough(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(tmp_path / "long.txt", numbered(100_000, "w"))
    counts: list[int] = []
    real = dataset._count

    def counted(*arguments: object) -> int:
        counts.append(real(*arguments))  # type: ignore[arg-type]
        return counts[-1]

    monkeypatch.setattr(dataset, "_count", counted)
    check_text(calibration(name), checkpoint, tmp_path)
    assert 64 <= counts[0] < 100_000


def test_without_a_tokenizer_the_files_alone_are_checked(tmp_path: Path) -> None:
    check_text([write(tmp_path / "short.txt", "short")], tmp_path, tmp_path, 32)
    with pytest.raises(CalibrationError, match="no such file"):
        check_text(["none.txt"], tmp_path, tmp_path, 32)
    with pytest.raises(CalibrationError, match="is empty"):
        check_text([write(tmp_path / "empty.txt", "")], tmp_path, tmp_path, 32)


def test_torch_is_not_loaded(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "w.txt", numbered(100, "w"))
    script = (
        "import sys; from pathlib import Path; from quantkit.calibrate.dataset import check_text;"
        "check_text(['w.txt'], Path(sys.argv[1]), Path(sys.argv[2]), 32); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(checkpoint), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_parquet_that_is_not_utf8_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = arrow.array([b"fine", b"caf\xe9"], type=arrow.binary())
    text = arrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(arrow.table({"text": text}), tmp_path / "t.parquet")
    with pytest.raises(CalibrationError, match=r"t.parquet: a text behind row 1 is not UTF-8"):
        check_text(["t.parquet"], checkpoint, tmp_path)


def test_ids_beyond_int32_are_one_line(tmp_path: Path) -> None:
    name = write(tmp_path / "w.txt", numbered(100, "w"))
    folder = write_checkpoint(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["w"] = 2**31 + 7
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=f"gives id 2147483655, but config.json has vocab_size {N_IDS}"):
        rows_of(folder, tmp_path, name)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 2**32}))
    with pytest.raises(CalibrationError, match="found vocab_size 4,294,967,296, at most 2,147,483,648"):
        rows_of(folder, tmp_path, name)


@pytest.mark.parametrize("kind", ["text", "template", "token"])
def test_control_characters_of_files_do_not_reach_the_terminal(tmp_path: Path, kind: str) -> None:
    hostile = "\x1b[31m\x00"
    settings = {
        "template": {"chat_template": "{{ raise_exception('\x1b[31m') }}"},
        "token": {"bos_token": hostile},
    }.get(kind, {})
    folder = write_checkpoint(tmp_path / "model", **settings)
    row = {hostile: 1} if kind == "text" else {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(CalibrationError) as caught:
        rows_of(folder, tmp_path, write(tmp_path / "\x1b[31mc.jsonl", json.dumps(row)))
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------------- rows that repeat

NAMES = ("Anna", "Bob", "Carl", "Dora", "Emil")


def repeated(kind: str) -> str:
    draw = random.Random(0)
    sentence = {
        "copies": lambda: "The same sentence again and again.",
        "numbers": lambda: f"The same sentence number {draw.randrange(10**5)} again and again, as it was before.",
        "names": lambda: f"{draw.choice(NAMES)} writes to {draw.choice(NAMES)} that all is well at home and abroad.",
    }[kind]
    return "\n".join(json.dumps({"text": sentence()}) for _ in range(3000))


@pytest.mark.parametrize("kind", ["copies", "numbers", "names"])
def test_nearly_identical_rows_get_a_warning(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    rows = rows_of(checkpoint, tmp_path, write(tmp_path / "dup.jsonl", repeated(kind)), tokens=32_768, length=256)
    (warning,) = rows.warnings
    assert warning.startswith("calibration: the rows repeat each other")


@pytest.mark.parametrize(("copies", "n_warnings"), [(2, 0), (10, 1)])
def test_copies_of_a_long_page_get_a_warning(checkpoint: Path, tmp_path: Path, copies: int, n_warnings: int) -> None:
    draw = random.Random(0)
    page = "".join(chr(draw.randrange(33, 127)) for _ in range(20_000))
    name = write(tmp_path / "pages.txt", page * copies)
    rows = rows_of(checkpoint, tmp_path, name, tokens=19_000 * copies, length=1024)
    assert len(rows.warnings) == n_warnings


@pytest.mark.parametrize("name", sorted(path.stem for path in (builtin_dir() / "mixed").iterdir()))
def test_the_built_in_texts_get_none(checkpoint: Path, tmp_path: Path, name: str) -> None:
    data = str(builtin_dir() / "mixed" / f"{name}.*")
    rows = token_rows(calibration(data, tokens=24_576, length=256), checkpoint, tmp_path)
    assert rows.warnings == ()


@pytest.mark.parametrize("rows", [(3000, 1_000_000), (2_000_000, 1)])
def test_parquet_that_grows_in_memory_is_refused(checkpoint: Path, tmp_path: Path, rows: tuple[int, int]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    count, length = rows
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * count, arrow.int32()), ["a" * length])
    parquet.write_table(arrow.table({"text": column}), tmp_path / "t.parquet", compression="zstd", store_schema=False)
    with pytest.raises(CalibrationError, match=r"t.parquet: holds more than 32,000,000 bytes of text"):
        check_text(["t.parquet"], checkpoint, tmp_path)
