"""The tokenizer of nano-deepseek-v3: byte-level BPE behind DeepSeek-V3's pre-tokenizer splits and special tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIALS = (BOS, EOS, PAD, USER, ASSISTANT)  # ids 0 to 4
BOS_ID, EOS_ID = 0, 1
SAMPLE_BYTES = 1_500_000  # of each domain, for the merges

# DeepSeek-V3's splits (llama.cpp calls the sequence "deepseek-v3"): digits in threes, CJK and kana runs, then words
# and punctuation.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + message['content'] + '" + EOS + "' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def render_chat(messages: list[dict[str, str]]) -> str:
    """What CHAT_TEMPLATE renders, without Jinja."""
    text = BOS
    for message in messages:
        prefix = {"system": "", "user": USER, "assistant": ASSISTANT}[message["role"]]
        text += prefix + message["content"] + (EOS if message["role"] == "assistant" else "")
    return text


def _sample(texts: dict[str, list[str]]) -> Iterator[str]:
    for name, documents in texts.items():
        size = 0
        for text in random.Random(1).sample(documents, len(documents)):
            for special in SPECIALS:
                text = text.replace(special, "\n")
            yield text
            size += len(text.encode())
            if size > SAMPLE_BYTES * (2 if name == "code" else 1):
                break


def train(texts: dict[str, list[str]], vocab_size: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
