"""Calibration sets: what is drawn, what is left out, and that memory has a bound."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.chats import ChatDocument
from quantkit.calibrate.documents import TextFile, builtin_dir, read_documents, stream_documents
from quantkit.calibrate.pieces import TextReader
from quantkit.calibrate.sets.cutting import pieces_of
from quantkit.calibrate.sets.pool import FULL, Pool, PooledDocument, draw
from quantkit.calibrate.sets.run import BuildOptions, build, manifest_path
from quantkit.calibrate.sets.scripts import script_of
from quantkit.calibrate.sets.shingles import NEAR_RUN, ExcludedText, shingles, similarity, sketch_of, words_of
from quantkit.documents.calibration_set import CalibrationSet
from quantkit.errors import CalibrationError, OutputError, QuantkitError
from tests.calibrate.byte_checkpoint import write, write_checkpoint

LATIN = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
CYRILLIC = [f"{a}{b}{c}" for a in "бвгджз" for b in "аеиоу" for c in "нрст"]


def prose(number: int, n_words: int = 60, words: Sequence[str] = LATIN) -> str:
    """A text that no other number has anything in common with."""
    return " ".join(random.Random(number).choices(words, k=n_words))


def jsonl(path: Path, texts: Sequence[str], **more: str) -> str:
    return write(path, "".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts))


def built(folder: Path, *names: str, tokens: int = 2000, replace: bool = True, **options: object) -> CalibrationSet:
    return build(
        names,
        folder / "set.jsonl",
        BuildOptions(tokens=tokens, **options),
        folder,
        replace=replace,  # type: ignore[arg-type]
    )


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "set.jsonl").read_text(encoding="utf-8").splitlines()]


def tokens_of(made: CalibrationSet) -> dict[tuple[str, str], int]:
    return {(one.domain, one.script): one.tokens for one in made.contents}


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


# ---------------------------------------------------------------------------------------------------------- duplicates


def test_exact_and_near_duplicates_are_left_out(tmp_path: Path) -> None:
    texts = [prose(i, 200) for i in range(5)]
    changed = [text.replace(" ", "  ").upper() for text in texts[:2]]
    words = texts[2].split()
    words[100] = "zzz"
    jsonl(tmp_path / "a.jsonl", [*texts, *texts[:3], *changed, " ".join(words)])
    jsonl(tmp_path / "b.jsonl", [texts[4]])
    made = built(tmp_path, "a.jsonl", "b.jsonl", tokens=100_000)
    assert made.documents == 5
    assert (made.left_out.exact_duplicates, made.left_out.near_duplicates) == (4, 3)
    assert len({" ".join(str(record["text"]).lower().split())[:40] for record in records(tmp_path)}) == 5


def test_of_near_duplicates_the_same_one_stays_in_any_order(tmp_path: Path) -> None:
    text = prose(1, 200)
    versions = [f"{text} end{i}" for i in range(6)]
    kept: set[str] = set()
    for order in (versions, versions[::-1]):
        jsonl(tmp_path / "a.jsonl", order)
        assert built(tmp_path, "a.jsonl").documents == 1
        kept.add(str(records(tmp_path)[0]["text"]))
    assert len(kept) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 150))
def test_similarity_estimates_jaccard(seed: int, n_changed: int) -> None:
    one = prose(seed, 400).split()
    other = one[:-n_changed] + prose(seed + 1, n_changed).split() if n_changed else one
    left, right = words_of(" ".join(one)), words_of(" ".join(other))
    first, second = (set(shingles(words, NEAR_RUN).tolist()) for words in (left, right))
    exact = len(first & second) / len(first | second)
    assert similarity(sketch_of(left), sketch_of(right)) == pytest.approx(exact, abs=0.25)  # four standard errors


def test_shingles_are_the_same_on_every_machine() -> None:
    assert shingles(words_of("One two three"), 2).tolist() == PINNED
    assert shingles(words_of("!!"), 2).size == 0
    assert shingles(words_of("床前明月"), 3).size == 2  # a character is a word


PINNED = [2124665179360163635, 15976512639192438460]


# ---------------------------------------------------------------------------------------------------------- exclusions


def test_text_in_common_with_excluded_files_is_left_out(tmp_path: Path) -> None:
    held_out = [prose(i, 300) for i in range(3)]
    write(tmp_path / "eval.txt", "\n\n".join(held_out))
    leaking = f"{prose(50)} {' '.join(held_out[1].split()[100:113])} {prose(51)}"
    harmless = f"{prose(60)} {' '.join(held_out[1].split()[100:111])} {prose(61)}"
    jsonl(tmp_path / "a.jsonl", [leaking, harmless, held_out[2]])
    made = built(tmp_path, "a.jsonl", exclude=("eval.txt",))
    assert [record["text"] for record in records(tmp_path)] == [harmless]
    assert made.left_out.excluded == 2
    assert [one.file for one in made.excluded if not one.file.startswith("builtin:")] == ["eval.txt"]


def test_the_evaluation_text_of_quantkit_never_comes_in(tmp_path: Path) -> None:
    text = (builtin_dir() / "eval" / "prose.txt").read_text(encoding="utf-8")
    write(tmp_path / "mine.txt", text[5000:15000])
    with pytest.raises(CalibrationError, match="shares text with the files to be kept out"):
        built(tmp_path, "mine.txt")
    write(tmp_path / "more.txt", prose(1, 300))
    made = built(tmp_path, "mine.txt", "more.txt")
    assert {one.domain for one in made.contents} == {"more"}
    assert "builtin:eval/prose.txt" in [one.file for one in made.excluded]


def test_nothing_is_shared_with_no_text() -> None:
    assert not ExcludedText([]).shares(words_of("some words"))
    assert ExcludedText(["Some words!"]).shares(words_of("some words"))


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


class CountingReader:
    """Reads a text, and remembers the most that was asked for at once."""

    def __init__(self, text: str) -> None:
        self._reader, self.most = TextReader(text), 0

    def read(self, n_characters: int, /) -> str:
        self.most = max(self.most, n_characters)
        return self._reader.read(n_characters)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab .\n床д😀"), max_size=400), st.integers(4, 60))
def test_pieces_hold_the_whole_text_and_are_short(text: str, most: int) -> None:
    reader = CountingReader(text)
    pieces = list(pieces_of(reader, most))
    assert all(0 < len(piece.encode()) <= most for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert reader.most <= most + 1


def test_pieces_end_at_paragraphs_lines_sentences_words() -> None:
    def cut(text: str) -> list[str]:
        return list(pieces_of(TextReader(text), 20))

    assert cut("one two three\n\nfour five six\nseven eight") == ["one two three", "four five six", "seven eight"]
    assert cut("One two three. Four five six.") == ["One two three. ", "Four five six."]
    assert cut("one two three four five six") == ["one two three four ", "five six"]
    assert cut("床前明月光。疑是地上霜。") == ["床前明月光。", "疑是地上霜。"]
    assert cut("x" * 45) == ["x" * 20, "x" * 20, "x" * 5]


# -------------------------------------------------------------------------------------------------------------- memory


def candidates(n: int, n_strata: int = 5, seed: int = 0) -> Iterator[PooledDocument]:
    """Made one at a time, no two alike."""
    draws = random.Random(seed)
    for number in range(n):
        stratum = (f"d{min(draws.randrange(n_strata), draws.randrange(n_strata))}", "Latin")
        yield PooledDocument(draws.getrandbits(64), stratum, draws.randrange(1, 100), b"", (2 * number, 2 * number + 1))


def test_the_pool_holds_little_of_a_long_stream_and_draws_as_from_all_of_it() -> None:
    pool, tokens, most = Pool(2000), 2000, 0
    for candidate in candidates(50_000):
        if pool.wants(candidate.stratum, candidate.key):
            pool.add(candidate)
        most = max(most, pool.n_tokens)
    assert most <= FULL * tokens + 100
    assert pool.draw(tokens) == draw(candidates(50_000), tokens)[0]


def test_a_duplicate_that_comes_late_is_found_without_a_list_of_all(tmp_path: Path) -> None:
    """The set of a text that is repeated a thousand times over is that of the text."""
    texts = [prose(i) for i in range(200)]
    jsonl(tmp_path / "a.jsonl", texts)
    built(tmp_path, "a.jsonl", tokens=1000)
    once = (tmp_path / "set.jsonl").read_bytes()
    jsonl(tmp_path / "a.jsonl", texts * 20)
    built(tmp_path, "a.jsonl", tokens=1000)
    assert (tmp_path / "set.jsonl").read_bytes() == once


def test_documents_come_before_the_file_has_been_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nno JSON\n')
    stream = stream_documents(TextFile("a.jsonl", tmp_path / "a.jsonl"), lambda block: None)
    assert [next(stream).where, next(stream).where] == ["a.jsonl:1", "a.jsonl:2"]
    with pytest.raises(CalibrationError, match=r"a.jsonl:3: is not JSON"):
        next(stream)


def test_reading_is_told(tmp_path: Path) -> None:
    size = sum((tmp_path / jsonl(tmp_path / f"{i}.jsonl", [prose(i)])).stat().st_size for i in range(3))
    told: list[tuple[int, int]] = []
    build(("*.jsonl",), tmp_path / "set.jsonl", BuildOptions(), tmp_path, on_read=lambda *now: told.append(now))
    assert told[-1] == (size, size)


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
