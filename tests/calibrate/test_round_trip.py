"""Tokenizers that keep the text pass, those that lose it are refused with what they lose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from quantkit.calibrate.dataset import eval_windows
from quantkit.calibrate.round_trip import check_round_trip
from quantkit.errors import CalibrationError
from tests.calibrate.byte_checkpoint import numbered, rows_of, write, write_checkpoint
from tests.calibrate.tokenizers_small import SENTENCES, byte_level, llama2, metaspace, with_normalizer, words

CODE = "def main(argument):\n    if argument:\n        return 1\n\n\n    return 20  # or less\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
TEXTS = [*SENTENCES, CODE, RUSSIAN, "x\t1\r\ny\t2\r\n", "“Quoted” … and ½ of ﬁve ①②③ 😀👍🏽\n", "नमस्ते दुनिया\n", ""] * 4


def without_decoder(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.decoder = None
    return tokenizer


def with_prefix_space(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


SOUND: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level without a decoder": lambda: without_decoder(byte_level()),
    "a space before the text": lambda: with_prefix_space(byte_level()),
    "metaspace": metaspace,
    "no pre-tokenizer": llama2,
    "NFC": lambda: with_normalizer(byte_level(), normalizers.NFC()),
    "NFKC": lambda: with_normalizer(byte_level(), normalizers.NFKC()),
    "uncased, Latin accents stripped": lambda: with_normalizer(
        byte_level(), normalizers.NFD(), normalizers.Replace(Regex("[\u0300-\u036f]"), ""), normalizers.Lowercase()
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_tokenizer_passes(name: str) -> None:
    check_round_trip(SOUND[name](), "text", TEXTS)


def replacing(pattern: str, by: str) -> Callable[[], Tokenizer]:
    return lambda: with_normalizer(byte_level(), normalizers.Replace(Regex(pattern), by))


LOSSY: dict[str, tuple[Callable[[], Tokenizer], list[str], str]] = {
    "runs of spaces": (replacing(" {2,}", " "), [CODE], r"loses spaces: '.*  .*' comes back as '.*'"),
    "tabs": (replacing("\t", ""), ["a\tb\tc\td\te\n"], "loses spaces"),
    "line ends": (replacing("\n", " "), [CODE], r"loses line ends: '.*\\n.*' comes back as"),
    "digits": (replacing(r"\d", ""), ["1 and 22 and 333, 4444\n"], "loses digits: '1' comes back as ''"),
    "Cyrillic": (replacing("[а-яА-Я]", ""), [RUSSIAN], "loses Cyrillic letters: 'Все' comes back as ''"),
    "Chinese": (replacing("[一-龥]", "?"), [SENTENCES[4]], "loses CJK letters"),
    "vowel signs": (replacing(r"\p{M}", ""), ["नमस्ते दुनिया\n" * 3], "loses Devanagari letters"),
    "brackets": (replacing(r"[()\[\]:]", ""), [CODE], "loses punctuation and symbols"),
    "words alone": (words, [SENTENCES[0]], "the checkpoint's tokenizer (loses|adds)"),
    "unknown words": (words, ["Something that nobody knows\n" * 5], "loses Latin letters: '.*' comes back as '<unk>'"),
    "between words": (words, ["a.b(c)+1, 'two'[3]:\n" * 5], "tokenizer (loses|adds)"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused_with_what_is_lost(name: str) -> None:
    make, texts, message = LOSSY[name]
    with pytest.raises(CalibrationError, match=message) as caught:
        check_round_trip(make(), "notes.txt", texts * 8)
    assert str(caught.value).startswith("notes.txt: ")
    assert str(caught.value).isprintable()


def test_what_the_text_does_not_hold_does_not_matter() -> None:
    check_round_trip(replacing("\n", " ")(), "notes.txt", ["No line ends here."] * 8)
    check_round_trip(replacing("[一-龥]", "?")(), "notes.txt", [CODE, RUSSIAN] * 8)


def test_a_few_strange_characters_in_much_text_are_tolerated() -> None:
    check_round_trip(replacing("[一-龥]", "?")(), "notes.txt", [RUSSIAN * 10] * 60 + ["永永永永永"])


def test_both_ways_to_rows_check(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert isinstance(tokenizer.decoder, decoders.ByteLevel)
    with_normalizer(tokenizer, normalizers.Replace("\n", "")).save(str(checkpoint / "tokenizer.json"))
    name = write(tmp_path / "w.txt", numbered(100, "w").replace(" ", "\n"))
    with pytest.raises(CalibrationError, match="w.txt: the checkpoint's tokenizer loses line ends"):
        rows_of(checkpoint, tmp_path, name)
    with pytest.raises(CalibrationError, match="loses line ends"):
        eval_windows([name], 16, checkpoint, tmp_path)
