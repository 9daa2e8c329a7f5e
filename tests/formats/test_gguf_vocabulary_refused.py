"""tokenizer.json and its settings that no GGUF file can hold: one line each; and what is taken as given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import SourceError
from quantkit.formats.gguf.vocabulary import vocabulary
from tests.formats.test_gguf_vocabulary import NANO, Edit, contents, copy_of_nano, llama_model, put


def several(*edits: Edit) -> Edit:
    return lambda tokenizer: [edit(tokenizer) for edit in edits] and None


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (put("model.type", "Unigram"), "model.type is 'Unigram', but GGUF files are written for byte-level BPE"),
        (put("pre_tokenizer", None), "pre_tokenizer has no ByteLevel step"),
        (put("pre_tokenizer", {"type": "Metaspace"}), "pre_tokenizer has no ByteLevel step"),
        (put("model.byte_fallback", True), "model.byte_fallback is True"),
        (put("model.unk_token", "<unk>"), "model.unk_token is '<unk>'"),
        (put("model.end_of_word_suffix", "</w>"), "model.end_of_word_suffix is '</w>'"),
        (put("normalizer", {"type": "NFC"}), "('NFC Split Split Split ByteLevel')"),
        (put("normalizer", {"type": "Sequence"}), "('? Split"),
        (put("normalizer", 3), "('? Split"),
        (put("model.ignore_merges", True), "none that quantkit knows llama.cpp's name of"),
        (put("pre_tokenizer.pretokenizers.0.pattern.Regex", r"\p{N}"), "`pre:` in the recipe to one of: deepseek-v3"),
        (put("pre_tokenizer.pretokenizers.0.type", "x\n" * 999), "none that quantkit knows"),
        (put("pre_tokenizer.pretokenizers", [None, {"type": "ByteLevel"}]), "('? ByteLevel')"),
        (put("model", []), "model is list, needed an object"),
        (put("model.vocab", None), "model.vocab is None"),
        (put("model.vocab.a", 7.0), "gives 'a' the id 7.0"),
        (put("model.vocab.a", True), "gives 'a' the id True"),
        (put("model.vocab.a", -1), "gives 'a' the id -1"),
        (put("model.vocab.a", 10**3000), "model.vocab gives 'a' the id '1000000"),
        (put("model.vocab.new", 7), "the id 7 stands for"),
        (put("added_tokens.4.content", "a"), "the added token 'a' has the id 4, but is the id "),
        (
            several(put("added_tokens.4.content", "x y"), put("added_tokens.4.id", 1281)),
            "has the id 1281, but is the id 1280",
        ),
        (put("model.vocab.n\0", 1279), "the id 1279 stands for"),
        (put("added_tokens", "x"), "added_tokens is 'x'"),
        (put("added_tokens", [1]), "an entry of added_tokens is 1"),
        (put("added_tokens.4.content", ""), "added_tokens holds dict"),
        (put("added_tokens.4.id", "4"), "added_tokens holds dict"),
        (put("added_tokens.4.rstrip", True), "has rstrip, which llama.cpp does not know"),
        (
            several(put("added_tokens.4.content", "x y"), put("added_tokens.4.id", 1280)),
            "the id 1280, but config.json has vocab_size 1280",
        ),
        (put("model.merges", None), "model.merges is None"),
        (put("model.merges", ["a"]), "model.merges holds 'a', needed two tokens"),
        (put("model.merges", ["a b c"]), "needed two tokens"),
        (put("model.merges", [["a"]]), "model.merges holds list, needed two tokens"),
        (put("model.merges", [[1, 2]]), "needed two tokens"),
        (put("model.merges", [["a", "\u4e00"]]), "needed two tokens"),
        (put("model.merges", [["e", "r"], "e r"]), "holds a pair twice"),
    ],
)
def test_refused(edit: Edit, found: str, tmp_path: Path) -> None:
    folder = copy_of_nano(tmp_path, edit)
    with pytest.raises(SourceError) as caught:
        vocabulary(folder, 1280)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.parametrize(
    ("content", "text"),
    [("\ud800", "is empty or no text"), ("n\0l", "is empty or no text"), ("[PAD1281]", "has two ids")],
)
def test_tokens_that_a_file_cannot_hold(content: str, text: str, tmp_path: Path) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append({"id": 1280, "content": content, "special": False})

    with pytest.raises(SourceError, match=text):
        vocabulary(copy_of_nano(tmp_path, edit), 1282)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"bos_token": "nobody"}, "bos_token is 'nobody', a token that tokenizer.json lacks"),
        ({"bos_token": 3}, "bos_token is 3"),
        ({"eos_token": None}, "no EOS token is named"),
        ({"bos_token": None, "add_bos_token": True}, "no BOS token is named"),
        ({"chat_template": "a\0b"}, "the chat template is no text"),
        ({"chat_template": "\udc00"}, "the chat template is no text"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        vocabulary(copy_of_nano(tmp_path, settings=settings), 1280)
    assert found in str(caught.value)


@pytest.mark.parametrize("number", [1280, -1, "0", True, [[]]])
def test_special_ids_beyond_the_vocabulary(number: object, tmp_path: Path) -> None:
    folder = copy_of_nano(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": number}))
    with pytest.raises(SourceError, match="eos_token_id is .*, needed an id below 1280"):
        vocabulary(folder, 1280)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "is missing or no file"),
        (b"[" * 100_000, "the JSON is nested too deeply"),
        (b"{", "is not sound JSON"),
        (b"[]", "holds a JSON list, an object was needed"),
        (b"\xff", "is not UTF-8"),
        (b"{}", "model is None, needed an object"),
    ],
)
def test_files_that_are_none(content: bytes | None, found: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(SourceError, match=found):
        vocabulary(tmp_path, 1280)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: no disk is used
    with pytest.raises(SourceError, match=r"has 1,099,511,627,776 bytes, at most 67,108,864 are read"):
        vocabulary(tmp_path, 1280)


def test_pre_is_taken_as_given_for_rules_that_are_not_recognised(tmp_path: Path) -> None:
    folder = copy_of_nano(tmp_path, put("pre_tokenizer.pretokenizers.0.pattern.Regex", "[0-9]{1,3}"))
    for pre in ("deepseek-v3", "kimi-k2"):
        assert vocabulary(folder, 1280, pre=pre)["tokenizer.ggml.pre"].value == pre
    with pytest.raises(
        SourceError, match="pre: found 'viking', needed one of: deepseek-v3, llama-bpe, glm4, qwen2, gpt-2, kimi-k2"
    ):
        vocabulary(folder, 1280, pre="viking")


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2", "kimi-k2"])
def test_pre_may_not_contradict_what_is_recognised(pre: str) -> None:
    said = f"cuts text by the rules of deepseek-v3, but the recipe says pre: {pre}"
    with pytest.raises(SourceError, match=said) as caught:
        vocabulary(NANO, 1280, pre=pre)
    assert caught.value.hint.startswith("Leave `pre:` out")
    assert vocabulary(NANO, 1280, pre="deepseek-v3") == vocabulary(NANO, 1280)


def test_ends_of_turns_beside_eos(tmp_path: Path) -> None:
    """GLM lists three: llama.cpp stops at each."""
    folder = copy_of_nano(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3, 4]}))
    values = contents(vocabulary(folder, 1280))
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 3, 4]
    with llama_model(tmp_path / "vocabulary.gguf", vocabulary(folder, 1280)) as model:
        assert model.metadata("tokenizer.ggml.eot_token_id") == "3"
