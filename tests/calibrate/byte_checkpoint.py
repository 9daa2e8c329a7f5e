"""A checkpoint folder whose tokenizer has one token for each byte, and texts for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.calibrate.dataset import Calibration, TokenRows, token_rows

BOS, EOS, USER, ASSISTANT = "<bos>", "<eos>", "<user>", "<assistant>"
SPECIAL = (BOS, EOS, USER, ASSISTANT)
N_IDS = 256 + len(SPECIAL)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def write_checkpoint(folder: Path, *, vocab_size: int = N_IDS, **tokenizer_config: Any) -> Path:
    """A byte-level tokenizer without merges: an ASCII text has one token a character, id = its byte's place."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i + len(SPECIAL) for i, token in enumerate(alphabet)}
    vocabulary |= {token: i for i, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.enable_truncation(max_length=16)  # must be switched off by the reader
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "bos_token_id": 0}))
    config = {"bos_token": BOS, "eos_token": {"content": EOS}, "add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokenizer_config))
    return folder


def text_of(checkpoint: Path, tokens: np.ndarray) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def rows_of(checkpoint: Path, base: Path, *data: str, tokens: int = 32, length: int = 8, seed: int = 0) -> TokenRows:
    calibration = Calibration(data=data, tokens=tokens, sequence_length=length, seed=seed)
    return token_rows(calibration, checkpoint, base)


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return path.name


def numbered(n_words: int, letter: str) -> str:
    return "".join(f"{letter}{i:04d} " for i in range(n_words))
