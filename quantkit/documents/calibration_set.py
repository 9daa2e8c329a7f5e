"""The manifest beside a calibration set: what it was made of, and what is in it. Plain values, no torch.

It holds no times and no absolute paths, so that the same text, options and seed give the same bytes.
"""

from __future__ import annotations

from typing import Literal

from quantkit.documents.json_text import json_text
from quantkit.documents.values import Count, DocumentPart


class SourceText(DocumentPart):
    """A file that was read, for the set or to keep its text out of it."""

    file: str
    sha256: str
    documents: Count
    """Documents with text."""


class DomainTokens(DocumentPart):
    """What the set holds of a domain in a script."""

    domain: str
    script: str
    """Of most letters: "Latin", "Han"...; "none" where there are no letters."""
    documents: Count
    tokens: Count


class LeftOut(DocumentPart):
    """Documents, or pieces of long ones, that were in reach of the draw and are not in the set."""

    exact_duplicates: Count
    near_duplicates: Count
    excluded: Count
    """They share text with the files that are to be kept out."""
    long_chats: Count
    """A chat is not cut, and one of them would be too large a part of the set."""


class CalibrationSet(DocumentPart):
    """The whole document."""

    kind: Literal["quantkit calibration set"] = "quantkit calibration set"
    schema_version: Literal[1] = 1
    file: str
    """Name of the set, which lies beside this manifest."""
    sha256: str
    documents: Count
    tokens: Count
    tokens_asked: Count
    counted_by: str
    """ "tokenizer.json", or "4 bytes a token", an estimate."""
    tokenizer_sha256: str | None
    """sha256 (hex) of the tokenizer.json that counted."""
    seed: Count
    domain_by: str
    """ "file", "folder", or the key or column that names the domain."""
    sequence_length: Count
    """Longer texts were cut to about so many tokens."""
    contents: tuple[DomainTokens, ...]
    left_out: LeftOut
    sources: tuple[SourceText, ...]
    excluded: tuple[SourceText, ...]

    @property
    def is_estimate(self) -> bool:
        """Whether no tokenizer counted the tokens."""
        return self.tokenizer_sha256 is None

    @property
    def is_short(self) -> bool:
        """Whether the sources hold fewer tokens than were asked for."""
        return self.tokens < self.tokens_asked

    def to_json(self) -> str:
        """The file's text."""
        return json_text(self.model_dump(mode="json"))
