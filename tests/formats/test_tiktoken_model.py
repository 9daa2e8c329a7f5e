"""A folder with tiktoken.model and no tokenizer.json: ids are those of tiktoken itself, and of llama.cpp."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from quantkit.calibrate.documents import TextDocument
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.errors import CalibrationError, SourceError
from quantkit.formats.gguf.vocabulary import CONTROL, UNUSED, USER_DEFINED, vocabulary
from quantkit.formats.tiktoken_model import KIMI_WORDS, as_tokenizer_json
from quantkit.plan.forecast import forecast
from quantkit.plan.recipe import Recipe
from tests.arch.relatives import kimi_k25
from tests.calibrate.tokenizers_small import SENTENCES
from tests.convert.jobs import decoded, int4, run, write_text
from tests.formats.test_gguf_vocabulary import awkward_texts, llama_model
from tests.tiny_models import write_checkpoint

ROOT = Path(__file__).parents[2]
TOKENS = 600
VOCABULARY = TOKENS + 256 + 8  # ids to spare
IM_END, THINK = TOKENS + 2, TOKENS + 22
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "added_tokens_decoder": {
        str(TOKENS): {"content": "[BOS]", "special": True},
        str(TOKENS + 1): {"content": "[EOS]", "special": True},
        str(IM_END): {"content": "<|im_end|>", "special": True},
        str(THINK): {"content": "<think>", "special": False},
    },
}


def byte_tokens() -> list[bytes]:
    """Tokens in order of rank, learned from a few sentences and files."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KIMI_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [path.read_text() for path in sorted((ROOT / "calibration_data").rglob("*")) if path.is_file()]
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, *(text[:20_000] for text in texts)], trainer)
    vocabulary = tokenizer.get_vocab()
    return [token_bytes(text) for text in sorted(vocabulary, key=lambda text: vocabulary[text])]


def token_bytes(text: str) -> bytes:
    """GPT-2's letters as the bytes that they stand for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return bytes(ord(letter) if ord(letter) in plain else rest[ord(letter) - 256] for letter in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kimi's files, but for the vocabulary."""
    folder = tmp_path_factory.mktemp("kimi")
    write_files(folder)
    return folder


def write_files(folder: Path) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(byte_tokens())]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))


def texts() -> list[str]:
    files = [path.read_text()[:3000] for path in sorted((ROOT / "calibration_data").rglob("*")) if path.is_file()]
    own = ["getUserName iPhone it's IT'S HelloWORLD", "汉字abc12345DEF 漢、かな", "12345 3.14\r\n\r\n  x", "Ünï Cœde's"]
    return [*own, *files, *SENTENCES, *awkward_texts(seed=1, n_texts=60)]


def test_ids_are_tiktoken_s(folder: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = pytest.importorskip("tiktoken.load").load_tiktoken_bpe(str(folder / "tiktoken.model"))
    special = {"[BOS]": TOKENS, "<|im_end|>": IM_END, f"<|reserved_token_{TOKENS + 9}|>": TOKENS + 9}
    encoding = tiktoken.Encoding("kimi", pat_str=KIMI_WORDS, mergeable_ranks=ranks, special_tokens=special)
    ours = load_tokenizer(folder).tokenizer
    for text in [*texts(), "[BOS]a<|im_end|>\n", f"<|reserved_token_{TOKENS + 9}|>"]:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == encoding.encode(text, allowed_special="all"), ascii(text)
        assert ours.decode(found, skip_special_tokens=False) == text


def test_calibration_begins_without_bos(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id is None
    ids = tokenizer.encode("a", [TextDocument("a:1", "getUserName")])
    assert len(ids) > 2
    assert ids.max() < TOKENS


def test_llama_cpp_gives_the_same_ids_but_for_capitals_inside_words(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder).tokenizer
    with llama_model(tmp_path / "vocabulary.gguf", vocabulary(folder, VOCABULARY)) as model:
        assert not model.warnings
        for text in texts():
            expected = ours.encode(text.lower(), add_special_tokens=False).ids
            np.testing.assert_array_equal(model.tokenize(text.lower()), expected, err_msg=ascii(text))
        assert model.tokenize("<think>", parse_special=True).tolist() == [THINK]
        assert model.tokenize("<|im_end|>", parse_special=True).tolist() == [IM_END]


def test_the_vocabulary_of_a_gguf(folder: Path) -> None:
    values = vocabulary(folder, VOCABULARY)
    tokens = values["tokenizer.ggml.tokens"].value
    types = values["tokenizer.ggml.token_type"].value
    assert isinstance(tokens, tuple)
    assert isinstance(types, tuple)
    assert values["tokenizer.ggml.pre"].value == "kimi-k2"
    assert values["tokenizer.ggml.add_bos_token"].value is False
    assert tokens[TOKENS : TOKENS + 4] == ("[BOS]", "[EOS]", "<|im_end|>", f"<|reserved_token_{TOKENS + 3}|>")
    assert (types[THINK], types[IM_END], types[TOKENS + 3], types[-1]) == (USER_DEFINED, CONTROL, CONTROL, UNUSED)
    assert values["tokenizer.ggml.eos_token_id"].value == TOKENS + 1


def test_it_is_converted_and_calibrated(tmp_path: Path) -> None:
    config = kimi_k25(vocab_size=VOCABULARY, n_routed_experts=8, num_experts_per_tok=2)
    write_checkpoint(tmp_path / "model", config)
    write_files(tmp_path / "model")
    write_text(tmp_path / "calibration.txt", 2000)
    rules = [int4("role:expert"), {"match": "*", "keep": "source"}]
    calibration = {"data": ["calibration.txt"], "tokens": 256, "sequence_length": 32, "min_expert_tokens": 16}
    outputs = [
        {"name": "main", "format": "compressed-tensors", "rules": rules},
        {"name": "gguf", "format": "gguf", "preset": "Q8_0"},
    ]
    recipe = Recipe.model_validate({"version": 1, "calibration": calibration, "outputs": outputs})
    made = forecast(tmp_path / "model", recipe, base_dir=tmp_path)
    assert any(line.startswith("output gguf: llama.cpp cuts text as Kimi's") for line in made.warnings)
    run(tmp_path / "model", recipe, tmp_path / "out")
    assert (tmp_path / "out" / "main" / "tiktoken.model").is_file()
    assert decoded(tmp_path / "out" / "main")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"IQ== 0\nIg== 2\n", r"line 2 is 'Ig== 2', needed a new token in base64 and the rank 1"),
        (b"IQ== 0\nIQ== 1\n", r"line 2 is 'IQ== 1'"),
        (b"<!DOCTYPE html>\n", r"line 1 is '<!DOCTYPE html>'"),
        (b"IQ== 0\n", r"has no token for 255 of the 256 bytes"),
        (b"IQ== " + b"9" * 5000, r"line 1 is 'IQ== 9+'"),
        (base64.b64encode(bytes(3000)) + b" 0", r"line 1 is 'AAAA"),
        (b"", r"has no token for 256 of the 256 bytes"),
    ],
)
def test_a_damaged_file(tmp_path: Path, content: bytes, said: str) -> None:
    write_files(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(SourceError, match=said):
        as_tokenizer_json(tmp_path)
    with pytest.raises(CalibrationError, match=said):
        load_tokenizer(tmp_path)


def test_other_tiktoken_models_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    with pytest.raises(SourceError, match=r"tiktoken\.model: holds tokens but no rules that cut text"):
        vocabulary(tmp_path, VOCABULARY)
