"""What a model card says of the source: its name on the hub and its licence, as far as its folder tells.

Of README.md only two lines of the front matter are looked for: no YAML of unknown origin is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 1 << 16
"""Read of README.md and of a licence's file."""
_NAME = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_BASE_MODEL = re.compile(
    rf"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*|\[)?[ \t]*[\"']?({_NAME})[\"']?", re.MULTILINE | re.ASCII
)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([a-z0-9][a-z0-9.-]{0,59})[\"']?[ \t]*$", re.MULTILINE | re.ASCII)
_KNOWN = (
    ("apache-2.0", re.compile(r"Apache License\s+Version 2\.0")),
    ("mit", re.compile(r"MIT License|Permission is hereby granted, free of charge, to any person")),
)


@dataclass(frozen=True, slots=True)
class SourceCard:
    """``base_model``: "deepseek-ai/DeepSeek-V3"; ``license``: the hub's word for it, "other" for a licence file that
    is not recognised. "" for what the folder does not tell."""

    base_model: str = ""
    license: str = ""


def source_card(directory: Path, config: Mapping[str, object]) -> SourceCard:
    """What a checkpoint's folder tells: by the name of a hub cache, README.md's front matter, config.json, LICENSE."""
    matter = _front_matter(directory / "README.md")
    base = _BASE_MODEL.search(matter)
    licence = _LICENCE.search(matter)
    named = base[1] if base else _configured(config)
    return SourceCard(_cached(directory) or named, licence[1] if licence else _licence_of(directory))


def _cached(directory: Path) -> str:
    """ "org/name" of .../models--org--name/snapshots/REVISION."""
    resolved = directory.resolve()
    parts = resolved.parent.parent.name.split("--") if resolved.parent.name == "snapshots" else []
    name = "/".join(parts[1:]) if parts[:1] == ["models"] else ""
    return name if re.fullmatch(_NAME, name, re.ASCII) else ""


def _configured(config: Mapping[str, object]) -> str:
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(_NAME, name, re.ASCII) else ""


def _front_matter(path: Path) -> str:
    text = _read(path)
    found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _licence_of(directory: Path) -> str:
    text = next((text for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (text := _read(directory / name))), "")
    return next((name for name, pattern in _KNOWN if pattern.search(text)), "other") if text else ""


def _read(path: Path) -> str:
    """The beginning of a regular file, "" if there is none that can be read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
