"""Texts for calibration sets, and sets that are built of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from quantkit.calibrate.sets.run import BuildOptions, build
from quantkit.documents.calibration_set import CalibrationSet
from tests.calibrate.byte_checkpoint import write

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
