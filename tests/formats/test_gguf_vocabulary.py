"""tokenizer.json as GGUF key-values: llama.cpp must give the ids of the tokenizers library."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from quantkit.formats.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from quantkit.formats.gguf.values import Value
from quantkit.formats.gguf.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, vocabulary
from tests.oracles import gguf_writer
from tests.oracles.llama_cpp import LlamaModel

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QUANTKIT_SHARED") or ROOT.parent / "shared") / "models"
NANO = ROOT / "examples" / "nano-deepseek-v3"
TINY = SHARED / "tiny-deepseek-v3"
SIZES = {NANO: 1280, TINY: 6144}
MODELS = [
    pytest.param(NANO, id="nano"),
    pytest.param(TINY, id="tiny", marks=pytest.mark.skipif(not TINY.is_dir(), reason="needs the shared models")),
]
CHARACTERS_OF_A_TEXT = 4_000  # of 43 texts; all of them in full were equal too, but take minutes

Edit = Callable[[dict[str, Any]], None]


def contents(values: Mapping[str, Value]) -> dict[str, Any]:
    return {key: list(value.value) if isinstance(value.value, tuple) else value.value for key, value in values.items()}


def copy_of_nano(folder: Path, edit: Edit | None = None, settings: Mapping[str, Any] | None = None) -> Path:
    """nano's tokenizer with tokenizer.json edited, entries of tokenizer_config.json replaced (None removes one)."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(NANO / name, folder / name)
    if edit is not None:
        tokenizer = json.loads((NANO / "tokenizer.json").read_text())
        edit(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if settings is not None:
        merged = {**json.loads((NANO / "tokenizer_config.json").read_text()), **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(merged))
    return folder


def put(path: str, value: Any) -> Edit:
    """Sets an entry, "model.type" within the object "model"."""

    def edit(tokenizer: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            tokenizer = tokenizer[int(parent) if parent.isdigit() else parent]
        tokenizer[last] = value

    return edit


def llama_model(path: Path, values: Mapping[str, Value]) -> LlamaModel:
    """llama.cpp with this vocabulary and nothing else. The file is written by gguf-py."""
    gguf_writer.write(path, contents(values), iter(()))
    return LlamaModel(path, vocab_only=True)


def ids_of(folder: Path, text: str) -> np.ndarray:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)


class TestValues:
    @pytest.mark.parametrize("folder", MODELS)
    def test_equal_an_independent_reading(self, folder: Path) -> None:
        assert contents(vocabulary(folder, SIZES[folder])) == gguf_writer.tokenizer_metadata(folder)

    def test_kinds(self) -> None:
        kinds = {key: value.type_name for key, value in vocabulary(NANO, 1280).items()}
        prefix = "tokenizer.ggml."
        assert kinds == {
            f"{prefix}model": "string",
            f"{prefix}pre": "string",
            f"{prefix}tokens": "array of string",
            f"{prefix}token_type": "array of i32",
            f"{prefix}merges": "array of string",
            f"{prefix}bos_token_id": "u32",
            f"{prefix}eos_token_id": "u32",
            f"{prefix}padding_token_id": "u32",
            f"{prefix}add_bos_token": "bool",
            f"{prefix}add_eos_token": "bool",
            "tokenizer.chat_template": "string",
        }

    def test_the_official_form(self, tmp_path: Path) -> None:
        """As DeepSeek writes it: merges as strings, an empty normaliser, chat tokens not special, ids to spare."""

        def edit(tokenizer: dict[str, Any]) -> None:
            tokenizer["normalizer"] = {"type": "Sequence", "normalizers": []}
            tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
            del tokenizer["model"]["ignore_merges"]
            for token in tokenizer["added_tokens"][3:]:
                token.update(special=False, normalized=True)
            think = {**tokenizer["added_tokens"][3], "id": 1280, "content": "<think>"}
            tokenizer["added_tokens"].append(think)

        values = contents(vocabulary(copy_of_nano(tmp_path, edit), 1284))
        assert values["tokenizer.ggml.pre"] == "deepseek-v3"
        assert values["tokenizer.ggml.merges"] == contents(vocabulary(NANO, 1280))["tokenizer.ggml.merges"]
        assert values["tokenizer.ggml.tokens"][1280:] == ["<think>", "[PAD1281]", "[PAD1282]", "[PAD1283]"]
        types = values["tokenizer.ggml.token_type"]
        assert types[1280:] == [USER_DEFINED, UNUSED, UNUSED, UNUSED]
        assert types[:6] == [CONTROL] * 5 + [NORMAL]

    def test_without_added_tokens_nothing_is_special(self, tmp_path: Path) -> None:
        values = contents(vocabulary(copy_of_nano(tmp_path, put("added_tokens", None)), 1280))
        assert set(values["tokenizer.ggml.token_type"]) == {NORMAL}

    def test_names_of_token_types(self) -> None:
        names = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED)
        assert tuple(map(int, names)) == (NORMAL, CONTROL, USER_DEFINED, UNUSED)


class TestLlamaCpp:
    @pytest.mark.parametrize("folder", MODELS)
    def test_ids_of_all_texts(self, folder: Path, tmp_path: Path) -> None:
        files = [file for file in (ROOT / "calibration_data").rglob("*") if file.is_file()]
        texts = [file.read_text()[:CHARACTERS_OF_A_TEXT] for file in (*files, *(SHARED / "text").rglob("*.txt"))]
        assert len(texts) > 20
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with llama_model(tmp_path / "vocabulary.gguf", vocabulary(folder, SIZES[folder])) as model:
            assert not model.warnings
            for text in texts:
                expected = tokenizer.encode(text, add_special_tokens=False).ids
                np.testing.assert_array_equal(model.tokenize(text), expected)

    @pytest.mark.parametrize("pre", PRE_TOKENIZERS)
    def test_ids_of_awkward_text_under_every_known_pre_tokenizer(self, pre: str, tmp_path: Path) -> None:
        """nano's vocabulary under the rules that the name stands for, as tokenizer.json spells them."""

        def edit(tokenizer: dict[str, Any]) -> None:
            tokenizer["pre_tokenizer"] = as_json(PRE_TOKENIZERS[pre])
            tokenizer["model"]["ignore_merges"] = PRE_TOKENIZERS[pre].ignore_merges
            tokenizer["normalizer"] = {"type": "NFC"} if PRE_TOKENIZERS[pre].normalizer else None

        values = vocabulary(copy_of_nano(tmp_path, edit), 1280)
        assert values["tokenizer.ggml.pre"].value == pre
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        with llama_model(tmp_path / "vocabulary.gguf", values) as model:
            for text in awkward_texts(seed=0, n_texts=100):
                text = text.lower() if pre == "kimi-k2" else unicodedata.normalize("NFC", text)
                expected = tokenizer.encode(text, add_special_tokens=False).ids
                np.testing.assert_array_equal(model.tokenize(text, parse_special=True), expected, err_msg=ascii(text))

    def test_bos_is_added_and_chat_tokens_of_users_stay_text(self, tmp_path: Path) -> None:
        text = "<｜User｜>Hi"
        with llama_model(tmp_path / "vocabulary.gguf", vocabulary(NANO, 1280)) as model:
            assert model.tokenize(text, add_special=True, parse_special=True).tolist()[:2] == [0, 3]
            assert 3 not in model.tokenize(text, parse_special=False)

    def test_padded_and_user_defined_tokens(self, tmp_path: Path) -> None:
        def edit(tokenizer: dict[str, Any]) -> None:
            token = {**tokenizer["added_tokens"][3], "special": False}
            tokenizer["added_tokens"] += [{**token, "id": 1280, "content": "<think>"}]
            tokenizer["added_tokens"] += [{**token, "id": 1281, "content": "a▁b"}]

        folder = copy_of_nano(tmp_path, edit)
        with llama_model(tmp_path / "vocabulary.gguf", vocabulary(folder, 1290)) as model:
            assert model.vocab_size == 1290
            for text in ("x<think>y</think>", "a▁b a b", "[PAD1282] [PAD1289]"):
                np.testing.assert_array_equal(model.tokenize(text), ids_of(folder, text))


class TestSettings:
    def test_special_tokens_as_objects_or_none(self, tmp_path: Path) -> None:
        folder = copy_of_nano(tmp_path, settings={"bos_token": None, "pad_token": {"content": "<｜User｜>"}})
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": None, "pad_token": {"content": "<｜User｜>"}, "unk_token": "a"})
        )
        values = contents(vocabulary(folder, 1280))
        assert "tokenizer.ggml.bos_token_id" not in values
        assert values["tokenizer.ggml.add_bos_token"] is False
        assert values["tokenizer.ggml.padding_token_id"] == 3
        assert values["tokenizer.ggml.unknown_token_id"] == values["tokenizer.ggml.tokens"].index("a")
        assert values["tokenizer.ggml.eos_token_id"] == 1  # of config.json
        assert "tokenizer.chat_template" not in values

    def test_without_tokenizer_config(self, tmp_path: Path) -> None:
        folder = copy_of_nano(tmp_path)
        (folder / "tokenizer_config.json").unlink()
        (folder / "config.json").write_text(json.dumps({"bos_token_id": 4}))
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": [2, 1]}))
        values = contents(vocabulary(folder, 1280))
        assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (4, 2)
        assert values["tokenizer.ggml.add_bos_token"] is False  # the post-processor adds token 0
        (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
        assert contents(vocabulary(folder, 1280))["tokenizer.ggml.add_bos_token"] is True

    def test_post_processor_in_a_sequence(self, tmp_path: Path) -> None:
        def edit(tokenizer: dict[str, Any]) -> None:
            processors = [{"type": "ByteLevel"}, tokenizer["post_processor"]]
            tokenizer["post_processor"] = {"type": "Sequence", "processors": processors}

        folder = copy_of_nano(tmp_path, edit, {"add_bos_token": None})
        assert contents(vocabulary(folder, 1280))["tokenizer.ggml.add_bos_token"] is True

    def test_chat_template_in_its_own_file_comes_first(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages }}"}]
        folder = copy_of_nano(tmp_path, settings={"chat_template": named})
        assert contents(vocabulary(folder, 1280))["tokenizer.chat_template"] == "{{ messages }}"
        (folder / "chat_template.jinja").write_text("{{ bos_token }}")
        assert contents(vocabulary(folder, 1280))["tokenizer.chat_template"] == "{{ bos_token }}"


# ------------------------------------------------------------------------------------------------------------- inputs


def as_json(rules: PreTokenizer) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json with these rules."""
    components: list[dict[str, Any]] = []
    for kind, *settings in rules.steps:
        if kind == "Split":
            regex, behavior, invert = settings
            components.append({"type": kind, "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert})
        else:
            space, words = settings
            components.append({"type": kind, "add_prefix_space": space, "trim_offsets": True, "use_regex": words})
    return components[0] if len(components) == 1 else {"type": "Sequence", "pretokenizers": components}


def awkward_texts(seed: int, n_texts: int) -> list[str]:
    """Spaces, digits, marks, scripts, emoji and special tokens in random order; every second text any characters."""
    rng = random.Random(seed)
    pools = [
        "abc xyzABC'sStTrRe'LL 've",
        "0123456789٣४Ⅷ½²",
        " \t\n\r\u00a0\u3000\u2028\u200b\u0085",
        "!?.,;:'\"()[]{}#$%&*+-/<=>@\\^_`|~",
        "你好世界ひらカタ一龥",
        "éüñßàαβγжщẞǅ한글",
        "😀👨\u200d👩\u200d👧🏳\ufe0f\u200d🌈",
        "e\u0301a\u0300\u20d7$€£¥←→∑√≤\ufffd\0\x1f\x7f\ufeff",
        ["<｜User｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User", "｜>"],
    ]
    texts = ["".join(rng.choice(rng.choice(pools)) for _ in range(150)) for _ in range(n_texts // 2)]
    for _ in range(n_texts - len(texts)):
        points = [rng.randrange(0x20, rng.choice((0x80, 0x3000, 0x110000))) for _ in range(80)]
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    return texts
