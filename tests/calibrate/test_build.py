"""Calibration sets: what is drawn, what the manifest says, what is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from quantkit.calibrate.chats import ChatDocument
from quantkit.calibrate.documents import TextFile, read_documents
from quantkit.calibrate.sets.run import BuildOptions, build, manifest_path
from quantkit.calibrate.sets.scripts import script_of
from quantkit.documents.calibration_set import CalibrationSet
from quantkit.errors import CalibrationError, OutputError, QuantkitError
from tests.calibrate.building import CYRILLIC, built, jsonl, prose, records, tokens_of
from tests.calibrate.byte_checkpoint import write, write_checkpoint

# ------------------------------------------------------------------------------------------------------------- balance


def test_domains_get_equal_tokens_however_large_they_are(tmp_path: Path) -> None:
    jsonl(tmp_path / "web.jsonl", [prose(i) for i in range(1000)])
    jsonl(tmp_path / "code.jsonl", [prose(10_000 + i) for i in range(30)])
    write(tmp_path / "book.txt", "\n\n".join(prose(20_000 + i) for i in range(100)))
    made = built(tmp_path, "web.jsonl", "code.jsonl", "book.txt", tokens=4000, sequence_length=128)
    found = tokens_of(made)
    assert set(found) == {("web", "Latin"), ("code", "Latin"), ("book", "Latin")}
    assert max(found.values()) - min(found.values()) <= 128
    assert 4000 <= made.tokens < 4000 + 128
    assert not made.is_short


def test_a_small_domain_is_used_up_and_the_others_share_the_rest(tmp_path: Path) -> None:
    jsonl(tmp_path / "small.jsonl", [prose(i) for i in range(3)])
    for name, start in (("a", 1000), ("b", 2000)):
        jsonl(tmp_path / f"{name}.jsonl", [prose(start + i) for i in range(200)])
    made = built(tmp_path, "*.jsonl", tokens=6000)
    documents = {one.domain: one.documents for one in made.contents}
    assert documents["small"] == 3
    assert abs(documents["a"] - documents["b"]) <= 1


def test_scripts_of_a_domain_get_equal_tokens(tmp_path: Path) -> None:
    texts = [prose(i) for i in range(400)] + [prose(i, 40, CYRILLIC) for i in range(40)]
    jsonl(tmp_path / "web.jsonl", texts)
    found = tokens_of(built(tmp_path, "web.jsonl", tokens=2000))
    assert found["web", "Cyrillic"] == pytest.approx(found["web", "Latin"], rel=0.2)


def test_every_beginning_of_the_set_is_balanced(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 1000), ("c", 2000)):
        jsonl(tmp_path / f"{name}.jsonl", [prose(start + i) for i in range(100)])
    built(tmp_path, "*.jsonl", tokens=5000)
    domains = [record["domain"] for record in records(tmp_path)]
    for length in range(3, len(domains)):
        counts = Counter(domains[:length])
        assert max(counts.values()) - min(counts.values()) <= 3


@pytest.mark.parametrize(
    ("domain_by", "domains"),
    [("file", {"en/data", "de/data", "code"}), ("folder", {"en", "de", "rest"}), ("topic", {"law", "art", "code"})],
)
def test_what_names_a_domain(tmp_path: Path, domain_by: str, domains: set[str]) -> None:
    for folder in ("en", "de", "rest"):
        (tmp_path / folder).mkdir()
    jsonl(tmp_path / "en" / "data-00000-of-00002.jsonl", [prose(1)], topic="law")
    jsonl(tmp_path / "en" / "data-00001-of-00002.jsonl", [prose(2)], topic="art")
    jsonl(tmp_path / "de" / "data.jsonl", [prose(3)], topic="law")
    write(tmp_path / "rest" / "code.txt", prose(4))
    made = built(tmp_path, "en/*", "de/*", "rest/*", domain_by=domain_by)
    assert {one.domain for one in made.contents} == domains
    assert made.domain_by == domain_by


def test_parquet_has_domains_too(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"text": [prose(1), prose(2)], "topic": ["law", "art"], "id": [1, 2]}
    parquet.write_table(arrow.table(rows), tmp_path / "t.parquet")
    assert {one.domain for one in built(tmp_path, "t.parquet", domain_by="topic").contents} == {"law", "art"}
    with pytest.raises(CalibrationError, match="found columns text, topic, id, needed `kind`"):
        built(tmp_path, "t.parquet", domain_by="kind")


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Plain English, 12.", "Latin"),
        ("Größe und Maß", "Latin"),
        ("Съешь же ещё этих мягких", "Cyrillic"),
        ("床前明月光, 疑是地上霜", "Han"),
        ("これはテストです", "Kana"),
        ("هذا نص", "Arabic"),
        ("12 + 7 = 19", "none"),
        ("", "none"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


# -------------------------------------------------------------------------------------------------- bytes and manifest


def test_the_same_text_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(300)])
    contents: list[tuple[bytes, bytes]] = []
    for seed in (0, 0, 1):
        built(tmp_path, "a.jsonl", seed=seed)
        contents.append(((tmp_path / "set.jsonl").read_bytes(), manifest_path(tmp_path / "set.jsonl").read_bytes()))
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]
    assert hashlib.sha256(contents[0][0]).hexdigest() == SET_SHA256


SET_SHA256 = "73da5c62ac264a3d4a6fdb617b1691b9940559c3476172b60d4e7169fba6cbef"
"""Pinned: a set that somebody describes by its options can be made again with any version."""


def test_the_manifest_says_what_the_set_is(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(20)])
    made = built(tmp_path, str(tmp_path / name), tokens=500, seed=3)
    path = manifest_path(tmp_path / "set.jsonl")
    assert path.name == "set.manifest.json"
    assert CalibrationSet.model_validate_json(path.read_text(encoding="utf-8")) == made
    assert made.sha256 == hashlib.sha256((tmp_path / "set.jsonl").read_bytes()).hexdigest()
    (source,) = made.sources
    assert source.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert (source.file, source.documents) == ("a.jsonl", 20)
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert made.tokens == sum(-(-len(str(record["text"]).encode()) // 4) for record in records(tmp_path))
    assert made.documents == len(records(tmp_path)) == sum(one.documents for one in made.contents)


def test_a_tokenizer_counts(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(50)])
    made = built(tmp_path, "a.jsonl", tokens=3000, tokenizer=model)
    assert made.tokens == sum(len(str(record["text"])) for record in records(tmp_path))  # a token a byte
    assert made.tokenizer_sha256 == hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    assert not made.is_estimate


# ------------------------------------------------------------------------------------------------------ texts and chats


def test_chats_are_whole_and_as_they_were(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"messages": [{"role": "user", "content": prose(1)}, {"role": "assistant", "content": "да"}]},
        {
            "messages": [{"role": "user", "content": prose(2)}, {"role": "assistant", "tool_calls": [call]}],
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ]
    long = {"messages": [{"role": "user", "content": prose(3, 4000)}]}
    write(tmp_path / "c.jsonl", "\n".join(json.dumps(row) for row in (*rows, long)))
    made = built(tmp_path, "c.jsonl", sequence_length=256)
    assert made.left_out.long_chats == 1

    def chats(name: str) -> dict[str, ChatDocument]:
        found = read_documents(TextFile(name, tmp_path / name))[1]
        return {chat.text(): chat for chat in found if isinstance(chat, ChatDocument)}

    before, after = chats("c.jsonl"), chats("set.jsonl")
    assert len(after) == 2
    for text, chat in after.items():
        assert chat.record() == before[text].record()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_fewer_tokens_than_asked_for_are_no_error(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(3)])
    made = built(tmp_path, "a.jsonl", tokens=10**9)
    assert made.is_short
    assert (made.documents, made.tokens_asked) == (3, 10**9)


@pytest.mark.parametrize(
    ("content", "name", "options", "said"),
    [
        (b"", "a.jsonl", {}, "a.jsonl: the file is empty"),
        (b'{"text": " "}', "a.jsonl", {}, "a.jsonl: holds no text"),
        (b'{"text": "caf\xe9"}', "a.jsonl", {}, "a.jsonl: is not UTF-8"),
        (b'{"body": "a"}', "a.jsonl", {}, "a.jsonl:1: found body, needed the key `text` or `messages`"),
        (b'{"text": "a"}', "a.jsonl", {"domain_by": "kind"}, "a.jsonl:1: found text, needed the key `kind`"),
        (b'{"text": "a", "kind": 3}', "a.jsonl", {"domain_by": "kind"}, "a.jsonl:1: `kind` is int, needed the name"),
        (b'{"text": "a", "kind": " "}', "a.jsonl", {"domain_by": "kind"}, "a.jsonl:1: `kind` is an empty string"),
        (b'{"text": "a"}', "a.csv", {}, "a.csv: found .csv, can read"),
        (b'{"text": "a"}', "a.jsonl", {"exclude": ("none.txt",)}, "none.txt: no such file"),
        (b'{"text": "a"}', "a.jsonl", {"tokenizer": Path("nowhere")}, "tokenizer.json: no such file"),
    ],
)
def test_what_is_unusable_is_refused_before_anything_is_written(
    tmp_path: Path, content: bytes, name: str, options: dict[str, object], said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=said.replace("[", r"\[")):
        built(tmp_path, name, **options)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_too_many_domains_are_refused(tmp_path: Path) -> None:
    rows = [json.dumps({"text": prose(i), "id": f"row {i}"}) for i in range(300)]
    write(tmp_path / "a.jsonl", "\n".join(rows))
    with pytest.raises(CalibrationError, match="more than 256 domains"):
        built(tmp_path, "a.jsonl", domain_by="id")


def test_places_that_are_taken_are_refused(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a.jsonl", [prose(1)])
    built(tmp_path, name)
    before = (tmp_path / "set.jsonl").read_bytes()
    cases = [("set.jsonl", "exists already"), ("set.txt", "found .txt, needed .jsonl"), ("no/set.jsonl", "no place")]
    for out, said in cases:
        with pytest.raises(OutputError, match=said):
            build((name,), tmp_path / out, BuildOptions(), tmp_path)
    for out in ("a.jsonl", "set.jsonl"):
        with pytest.raises(OutputError, match="is one of the files that are read"):
            build(("*.jsonl",), tmp_path / out, BuildOptions(), tmp_path, replace=True)
    assert (tmp_path / "set.jsonl").read_bytes() == before
    with pytest.raises(QuantkitError, match="No files were given"):
        build((), tmp_path / "new.jsonl", BuildOptions(), tmp_path)
