"""Small tokenizers of the kinds that are published, trained on a few sentences."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, 0123456789 times.\n",
    "def main(argument):\n    return [argument + 1, 'two']\n",
    "Größe, façade, naïve: mañana.\t\n",
    "Жили-были дед и баба.\n",
    "你好，世界。今天天气很好。\n",
)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, DeepSeek."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As SentencePiece: spaces become a letter, unknown characters bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *pieces], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = settings["added_tokens"][:1]
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def llama2() -> Tokenizer:
    """As the Llama 2 file: no pre-tokenizer at all, a space before the text."""
    settings = json.loads(metaspace().to_str())
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    settings |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}}
    return Tokenizer.from_str(json.dumps(settings))


def words() -> Tokenizer:
    """A tokenizer of words between spaces, which loses the spaces and all words that it does not know."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def with_normalizer(tokenizer: Tokenizer, *steps: normalizers.Normalizer) -> Tokenizer:
    """The tokenizer, which from now on changes the text so before it is cut."""
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer
