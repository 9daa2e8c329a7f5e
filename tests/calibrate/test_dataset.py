"""Text -> token rows: the packing as defined, the chat template's limits, and each kind of unusable input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantkit.calibrate import documents as documents_module
from quantkit.calibrate.dataset import Calibration, eval_windows
from quantkit.errors import CalibrationError
from tests.calibrate.byte_checkpoint import BOS, N_IDS, SPECIAL, numbered, rows_of, text_of, write, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


# ---------------------------------------------------------------------------------------------------------- packing


def test_each_row_is_bos_and_consecutive_text_of_one_file(checkpoint: Path, tmp_path: Path) -> None:
    texts = {name: numbered(100, name) for name in "abc"}
    names = [write(tmp_path / f"{name}.txt", text) for name, text in texts.items()]
    rows = rows_of(checkpoint, tmp_path, *names, tokens=320, length=32)
    assert rows.tokens.shape == (10, 32)
    assert rows.tokens.dtype == np.int32
    assert rows.domains == ("a", "b", "c") * 3 + ("a",)  # round-robin
    assert [entry.rows for entry in rows.provenance] == [4, 3, 3]
    for domain, row in zip(rows.domains, rows.tokens, strict=True):
        assert row[0] == 0
        assert text_of(checkpoint, row[1:]) in texts[domain]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), length=st.integers(2, 9), seed=st.integers(0, 2**40))
def test_all_whole_rows_can_be_taken_and_never_overlap(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, seed: int
) -> None:
    """Each character occurs once in a file, so that two overlapping rows would share one."""
    folder = tmp_path_factory.mktemp("text")
    alphabet = "".join(chr(33 + i) for i in range(60))
    names = [write(folder / f"{i}.txt", alphabet[:size]) for i, size in enumerate(sizes)]
    whole_rows = [size // (length - 1) for size in sizes]
    if sum(whole_rows) == 0:
        with pytest.raises(CalibrationError, match="holds 0"):
            rows_of(checkpoint, folder, *names, tokens=1, length=length, seed=seed)
        return
    rows = rows_of(checkpoint, folder, *names, tokens=sum(whole_rows) * length, length=length, seed=seed)
    assert [entry.rows for entry in rows.provenance] == whole_rows
    for i in range(len(sizes)):
        body = rows.tokens[[domain == str(i) for domain in rows.domains], 1:].ravel()
        assert len(set(body.tolist())) == body.size
    with pytest.raises(CalibrationError, match="tokens were asked for"):
        rows_of(checkpoint, folder, *names, tokens=sum(whole_rows) * length + 1, length=length, seed=seed)


def test_rows_spread_over_the_file_and_follow_the_seed(checkpoint: Path, tmp_path: Path) -> None:
    text = numbered(1000, "w")
    name = write(tmp_path / "w.txt", text)
    rows = rows_of(checkpoint, tmp_path, name, tokens=80, length=8)
    starts = [text.index(text_of(checkpoint, row[1:])) for row in rows.tokens]
    assert [start * 10 // len(text) for start in starts] == list(range(10))
    again, other = (rows_of(checkpoint, tmp_path, name, tokens=80, seed=seed) for seed in (0, 1))
    assert np.array_equal(again.tokens, rows.tokens)
    assert not np.array_equal(other.tokens, rows.tokens)


def test_rows_do_not_depend_on_where_the_file_lies(checkpoint: Path, tmp_path: Path) -> None:
    text = numbered(100, "w")
    elsewhere = tmp_path / "deep" / "er"
    elsewhere.mkdir(parents=True)
    name = write(tmp_path / "one.txt", text)
    write(elsewhere / "two.txt", text)
    rows = [rows_of(checkpoint, tmp_path, entry).tokens for entry in (name, str(elsewhere / "two.txt"))]
    assert np.array_equal(*rows)


def test_the_choice_of_rows_stays_what_it_was(checkpoint: Path, tmp_path: Path) -> None:
    """Pinned: a resumed job and a published recipe count on the same rows from any version and machine."""
    name = write(tmp_path / "w.txt", numbered(100, "w"))
    rows = rows_of(checkpoint, tmp_path, name, tokens=24, seed=7)
    assert [text_of(checkpoint, row[1:]) for row in rows.tokens] == PINNED


PINNED = ["19 w002", " w0045 ", "0097 w0"]


def test_a_model_without_bos_gets_rows_of_text_alone(tmp_path: Path) -> None:
    name = write(tmp_path / "w.txt", numbered(100, "w"))
    no_bos: dict[str, Any]
    for i, no_bos in enumerate(({"add_bos_token": False}, {"bos_token": None, "add_bos_token": None})):
        folder = write_checkpoint(tmp_path / f"m{i}", **no_bos)
        rows = rows_of(folder, tmp_path, name, tokens=600, length=60)
        assert rows.tokens.min() >= len(SPECIAL)
        assert rows.tokens.shape == (10, 60)


def test_bos_comes_from_config_json_where_the_tokenizer_has_no_settings(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    name = write(tmp_path / "w.txt", numbered(10, "w"))
    assert set(rows_of(folder, tmp_path, name).tokens[:, 0].tolist()) == {0}


# -------------------------------------------------------------------------------------------------------- documents


def test_texts_are_joined_by_a_blank_line_and_recorded(checkpoint: Path, tmp_path: Path) -> None:
    lines = [{"text": "one"}, {"text": "  "}, {"text": "two\u2028"}, {"text": "three"}]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    name = write(tmp_path / "d.jsonl", content)
    rows = rows_of(checkpoint, tmp_path, name, tokens=19, length=19)
    assert text_of(checkpoint, rows.tokens[0, 1:]) == "one\n\ntwo\u2028\n\nthree"
    (entry,) = rows.provenance
    assert (entry.file, entry.documents, entry.tokens, entry.rows) == ("d.jsonl", 3, 18, 1)
    import hashlib

    assert entry.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_chats_go_through_the_template_and_keep_one_bos(checkpoint: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    name = write(
        tmp_path / "c.jsonl", json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat, "text": "no"})
    )
    expected = "<user>2+2?<assistant>4<eos>" * 2
    length = 1 + 2 * len("U2+2?A4E")
    rows = rows_of(checkpoint, tmp_path, name, tokens=length, length=length)
    assert text_of(checkpoint, rows.tokens[0]) == BOS + expected


def test_the_template_file_goes_before_the_settings(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", chat_template=[{"name": "default", "template": "abcdefgh"}])
    name = write(tmp_path / "c.jsonl", json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert text_of(folder, rows_of(folder, tmp_path, name, tokens=9, length=9).tokens[0, 1:]) == "abcdefgh"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content * 4 }}")
    assert text_of(folder, rows_of(folder, tmp_path, name, tokens=9, length=9).tokens[0, 1:]) == "hihihihi"


def test_parquet_text_and_messages(checkpoint: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": [1, 2], "text": ["abc", "defgh"]}), tmp_path / "t.parquet")
    assert (
        text_of(checkpoint, rows_of(checkpoint, tmp_path, "t.parquet", tokens=11, length=11).tokens[0, 1:])
        == "abc\n\ndefgh"
    )
    messages = [[{"role": "user", "content": "abcdef"}]]
    parquet.write_table(arrow.table({"messages": messages}), tmp_path / "m.parquet")
    rows = rows_of(checkpoint, tmp_path, "m.parquet", tokens=8)
    assert text_of(checkpoint, rows.tokens[0]) == "<bos><user>abcdef"
    parquet.write_table(arrow.table({"words": ["abc"]}), tmp_path / "w.parquet")
    parquet.write_table(arrow.table({"text": ["abc", None]}), tmp_path / "n.parquet")
    write(tmp_path / "x.parquet", "PAR1 not really")
    for name, message in {"w": "found columns words", "n": "row 2: `text` is NoneType", "x": "not readable"}.items():
        with pytest.raises(CalibrationError, match=message):
            rows_of(checkpoint, tmp_path, f"{name}.parquet")


def test_parquet_without_pyarrow_names_the_extra(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    write(tmp_path / "t.parquet", "PAR1")
    with pytest.raises(CalibrationError, match=r"Install pyarrow \(the extra `parquet`\)"):
        rows_of(checkpoint, tmp_path, "t.parquet")


def test_entries_keep_their_order_globs_are_sorted_and_no_file_counts_twice(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("z.txt", "b.txt", "a.txt", "sub/c.txt"):
        write(tmp_path / name, numbered(20, "w"))
    rows = rows_of(checkpoint, tmp_path, "z.txt", "*.txt", "**/c.txt", f"{tmp_path}/a.*", tokens=64)
    assert [entry.file for entry in rows.provenance] == ["z.txt", "a.txt", "b.txt", "sub/c.txt"]


def test_builtin_texts(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "prose.txt", numbered(100, "p"))
    write(tmp_path / "mixed" / "README.md", "where it is from")
    monkeypatch.setattr(documents_module, "builtin_dir", lambda: tmp_path)
    rows = rows_of(checkpoint, tmp_path, "builtin:mixed")
    assert [entry.file for entry in rows.provenance] == ["builtin:mixed/prose.txt"]
    for name in ("eval", "../mixed", ""):
        with pytest.raises(CalibrationError, match="There are: mixed"):
            rows_of(checkpoint, tmp_path, f"builtin:{name}")


# ----------------------------------------------------------------------------------------------------------- errors

BAD_FILES = {
    "empty.txt": (b"", "empty.txt: the file is empty"),
    "blank.jsonl": (b'{"text": " "}\n', "blank.jsonl: holds no text"),
    "latin.txt": (b"caf\xe9 au lait", "latin.txt: is not UTF-8 .byte 0xe9 at offset 3"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "bad.jsonl:2: is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: is not JSON"),
    "list.jsonl": (b"[1]", "list.jsonl:1: found list, needed an object"),
    "key.jsonl": (b'{"body": "a", "id": 1}', "key.jsonl:1: found body, id, needed the key `text` or `messages`"),
    "number.jsonl": (b'{"text": 5}', "number.jsonl:1: `text` is int"),
    "chat.jsonl": (b'{"messages": []}', "chat.jsonl:1: messages is an empty list"),
    "role.jsonl": (b'{"messages": [{"content": "a"}]}', "role.jsonl:1: messages.0..role is missing or null"),
    "half.jsonl": (b'{"text": "\\ud800"}', "half.jsonl:1: holds half of a surrogate pair"),
    "half_chat.jsonl": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half_chat.jsonl:1: holds half"),
    "text.csv": (b"a,b", "text.csv: found .csv, can read .txt, .jsonl, .parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_that_names_it(checkpoint: Path, tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        rows_of(checkpoint, tmp_path, name, tokens=32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("none.txt", "no such file"),
        ("none*.txt", "no file matches"),
        ("folder", "is a folder"),
        ("builtin:nothing", "no such built-in text"),
        ("", "is empty"),
        ("a" * 5000 + ".txt", "no usable file name"),
        ("***.txt", "no usable file name|no file matches"),
    ],
)
def test_bad_entry(checkpoint: Path, tmp_path: Path, entry: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match=message):
        rows_of(checkpoint, tmp_path, entry)


def test_too_little_text_says_how_much_there_is(checkpoint: Path, tmp_path: Path) -> None:
    name = write(tmp_path / "w.txt", "0123456789" * 10)
    with pytest.raises(CalibrationError, match="1,000 tokens were asked for, the text holds 112 in whole rows of 8"):
        rows_of(checkpoint, tmp_path, name, tokens=1000)


@pytest.mark.parametrize(
    "fields",
    [{"data": ()}, {"tokens": 0}, {"tokens": True}, {"sequence_length": 1}, {"seed": -1}, {"sequence_lenght": 8}],
)
def test_bad_settings_are_refused(fields: dict[str, Any]) -> None:
    good: dict[str, Any] = {"data": ("a.txt",), "tokens": 8, "sequence_length": 8}
    with pytest.raises(ValidationError):
        Calibration(**good | fields)


def test_bad_tokenizer_files(tmp_path: Path) -> None:
    name = write(tmp_path / "w.txt", numbered(100, "w"))
    cases: list[tuple[str, bytes | None, str]] = [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", b"{}", "tokenizer.json: is no tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json: is not UTF-8"),
        ("config.json", b"[]", "config.json: found list"),
        ("config.json", b"{", "config.json: is not JSON"),
        ("config.json", b"{}", "found vocab_size None"),
        ("config.json", b'{"vocab_size": 50}', r"gives id \d+, but config.json has vocab_size 50"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}', "names the BOS token"),
        ("tokenizer_config.json", b'{"bos_token": "<s>"}', "names the BOS token '<s>', tokenizer.json lacks it"),
    ]
    for i, (file, content, message) in enumerate(cases):
        folder = write_checkpoint(tmp_path / f"model{i}")
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        with pytest.raises(CalibrationError, match=message):
            rows_of(folder, tmp_path, name)


def test_bos_asked_for_but_unknown(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", bos_token=None)
    (folder / "config.json").write_text(json.dumps({"vocab_size": N_IDS}))
    with pytest.raises(CalibrationError, match="asks for a BOS token"):
        rows_of(folder, tmp_path, write(tmp_path / "w.txt", numbered(100, "w")))


def test_chat_without_template(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", chat_template=None)
    name = write(tmp_path / "c.jsonl", json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(
        CalibrationError, match="c.jsonl:1: holds chat messages, but the checkpoint has no chat template"
    ):
        rows_of(folder, tmp_path, name)


# ------------------------------------------------------------------------------------------------------ eval windows


def test_windows_are_whole_chunks_evenly_spread(checkpoint: Path, tmp_path: Path) -> None:
    text = numbered(100, "w")  # 600 characters = 60 chunks of 10
    write(tmp_path / "w.txt", text)
    write(tmp_path / "v.txt", text[:57])
    rows = eval_windows(["w.txt", "v.txt"], 11, checkpoint, tmp_path)
    assert rows.domains == ("w",) * 60 + ("v",) * 5
    assert text_of(checkpoint, rows.tokens[:60, 1:].ravel()) == text
    assert set(rows.tokens[:, 0].tolist()) == {0}
    some = eval_windows(["w.txt", "v.txt"], 11, checkpoint, tmp_path, max_windows_per_file=8)
    chunks = np.unique(np.linspace(0, 59, 8).astype(int)).tolist()
    assert [text_of(checkpoint, row[1:]) for row in some.tokens[:8]] == [text[10 * i : 10 * i + 10] for i in chunks]
    assert [entry.rows for entry in some.provenance] == [8, 5]


def test_bad_windows(checkpoint: Path, tmp_path: Path) -> None:
    name = write(tmp_path / "w.txt", "short")
    with pytest.raises(CalibrationError, match="w.txt: holds 5 tokens, one window needs 511"):
        eval_windows([name], 512, checkpoint, tmp_path)
    with pytest.raises(CalibrationError, match="context 1"):
        eval_windows([name], 1, checkpoint, tmp_path)
    with pytest.raises(CalibrationError, match="max_windows_per_file 0"):
        eval_windows([name], 4, checkpoint, tmp_path, max_windows_per_file=0)


# ------------------------------------------------------------------------------------------------ the larger real model

SHARED = Path(os.environ.get("QUANTKIT_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "models"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared models (QUANTKIT_SHARED)")
def test_tiny_deepseek_v3_protocol() -> None:
    """The 88 windows (45,056 tokens) that the model's published measurements were made with."""
    from tokenizers import Tokenizer

    model = SHARED / "tiny-deepseek-v3"
    rows = eval_windows([str(SHARED / "text/eval/*.txt")], 512, model, SHARED, max_windows_per_file=8)
    assert rows.tokens.shape == (88, 512)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode((SHARED / "text/eval/speech.txt").read_text(), add_special_tokens=False).ids
    windows = rows.tokens[[domain == "speech" for domain in rows.domains]]
    n_chunks = len(ids) // 511
    expected = [ids[511 * i : 511 * i + 511] for i in np.unique(np.linspace(0, n_chunks - 1, 8).astype(int))]
    assert windows[:, 1:].tolist() == expected
    calibration = rows_of(model, SHARED, "text/calibration/*.txt", tokens=131072, length=512)
    assert calibration.tokens.shape == (256, 512)
    assert set(calibration.domains[:11]) == {path.stem for path in (SHARED / "text/calibration").glob("*.txt")}
