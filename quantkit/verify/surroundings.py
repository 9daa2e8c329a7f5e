"""The files around the weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import parse_json_object
from quantkit.formats.safetensors.reader import read_small
from quantkit.formats.side_files import TOKENIZERS, check_side_files, has_chat_template

GENERATION = "generation_config.json"
NO_TOKENIZER = "no tokenizer files: text cannot be served."
NO_TOKENIZER_TO_START = (
    f"no tokenizer files, one of {', '.join(TOKENIZERS)} was needed: it starts only with --skip-tokenizer-init."
)


def faults(directory: Path) -> Iterator[str]:
    """What no runtime could read."""
    try:
        check_side_files(directory)
    except SourceError as error:
        yield error.message


def has_tokenizer(directory: Path) -> bool:
    """Whether any file is there that holds a vocabulary."""
    return any((directory / name).is_file() for name in TOKENIZERS)


def notes(directory: Path, config: Mapping[str, object]) -> Iterator[str]:
    """What is missing, or contradicts config.json."""
    if has_tokenizer(directory) and not has_chat_template(directory):
        yield "no chat template: chats are refused, or the format is guessed."
    if not (directory / GENERATION).is_file():
        return
    try:
        generation = parse_json_object(read_small(directory / GENERATION), str(directory / GENERATION))
    except SourceError:
        return  # `faults` names it
    ids = {where: stated.get("eos_token_id") for where, stated in (("config.json", config), (GENERATION, generation))}
    if all(value is not None for value in ids.values()) and len({json.dumps(value) for value in ids.values()}) > 1:
        said = ", ".join(f"{where} {json.dumps(value)[:40]}" for where, value in ids.items())
        yield f"eos_token_id: {said}. vLLM stops at either, llama.cpp knows one."
