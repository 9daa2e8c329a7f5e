"""Calibration sets: what is left out, as a duplicate or as text in common with others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.documents import builtin_dir
from quantkit.calibrate.sets.shingles import NEAR_RUN, ExcludedText, shingles, similarity, sketch_of, words_of
from quantkit.errors import CalibrationError
from tests.calibrate.building import built, jsonl, prose, records
from tests.calibrate.byte_checkpoint import write


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


def test_a_duplicate_that_comes_late_is_found_without_a_list_of_all(tmp_path: Path) -> None:
    """The set of a text that is repeated a thousand times over is that of the text."""
    texts = [prose(i) for i in range(200)]
    jsonl(tmp_path / "a.jsonl", texts)
    built(tmp_path, "a.jsonl", tokens=1000)
    once = (tmp_path / "set.jsonl").read_bytes()
    jsonl(tmp_path / "a.jsonl", texts * 20)
    built(tmp_path, "a.jsonl", tokens=1000)
    assert (tmp_path / "set.jsonl").read_bytes() == once
