"""config.json of a folder, and `open_plain`: a checkpoint in BF16, F16, F32 or FP8 blocks -> a decoded source.

config.json and the shards must agree on which of these it is. A checkpoint that is quantised to few bits is not opened
here: `quantkit.formats.packed_source` opens those that can be decoded.
"""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from quantkit.errors import SourceError
from quantkit.formats.fp8_source import Fp8Source
from quantkit.formats.safetensors.header import parse_json_object, printable
from quantkit.formats.safetensors.reader import SafetensorsSource, read_small
from quantkit.formats.storage import LOCAL, Storage

DEFAULT_BLOCK_SIZE = (128, 128)
PACKED_METHOD = "compressed-tensors"
"""The ``quant_method`` whose packed linears can be decoded."""
_NAMED = {"mxfp4": " (MXFP4 blocks of gpt-oss)", "gptq": " (GPTQ)", "awq": " (AWQ)", "bitsandbytes": " (NF4 or FP4)"}
"""What other methods are, for messages."""


def open_plain(path: Path | str, storage: Storage = LOCAL) -> Fp8Source:
    """Open a checkpoint that is not packed, by its headers alone. ``.config``: the raw config.json, ``.directory``: the
    folder. ``storage``: opens its shards.

    Raises `SourceError` if anything about config, index, headers, or FP8 pairs is missing, damaged or contradictory.
    """
    directory = Path(path)
    config = read_config(directory)
    block_size = float8_block_size(directory, config)
    raw = SafetensorsSource(directory, storage=storage)
    try:
        _check_agreement(raw, block_size is not None)
        return Fp8Source(raw, block_size or DEFAULT_BLOCK_SIZE, config)
    except SourceError:
        raw.close()
        raise


def check_folder(path: Path) -> None:
    """Raise `SourceError` if a path is no folder. What looks like the name of a repository is told from a typing
    error: a repository has an address."""
    if path.is_dir():
        return
    hint = "Give the folder of a checkpoint: config.json and, to convert it, its safetensors shards."
    if not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path), re.ASCII):
        hint = f"To read it from the hub, give hf://{path}"
    if path.suffix == ".gguf" and path.is_file():
        raise _no_source(path)
    what = "is not a folder" if os.path.lexists(path) else "no such folder"
    raise SourceError(f"{printable(str(path))}: {what}.", hint=hint)


def _no_source(path: Path) -> SourceError:
    return SourceError(
        f"{printable(str(path))}: is a GGUF model, a folder with config.json was needed.",
        hint="`convert` and `plan` read GGUF beside --config DIR, the folder of the original's config.json.",
    )


def read_config(directory: Path) -> dict[str, object]:
    """The raw config.json of a folder. Raises `SourceError` if either is missing, or it is not JSON, or no object."""
    check_folder(directory)
    path = directory / "config.json"
    if not os.path.lexists(path) and any(directory.glob("*.gguf")):
        raise _no_source(directory)
    if not os.path.lexists(path) and (hint := _instead_of_config(directory)):
        raise SourceError(f"{path}: no such file.", hint=hint)
    return parse_json_object(read_small(path).removeprefix(BOM_UTF8), str(path))


def _instead_of_config(directory: Path) -> str:
    """A hint from what a folder without config.json holds, "" if nothing speaks for itself."""
    if os.path.lexists(directory / "params.json"):
        return "There is params.json: a checkpoint in Mistral's own form, which is not read."
    inside = sorted(found.parent for found in directory.glob("*/config.json"))
    listed = ", ".join(printable(str(folder)) for folder in inside[:3])
    return f"Is it a folder inside it? There is {listed}." if listed else ""


def hub_repository(directory: Path) -> str | None:
    """``ORG/NAME`` of a folder inside the hub's cache, ``models--ORG--NAME/snapshots/COMMIT``; None of any other."""
    folder = directory.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def checkpoint_name(directory: Path) -> str:
    """What to call a checkpoint: its folder's name, or the repository's if the folder is named by a commit."""
    repository = hub_repository(directory)
    return directory.resolve().name if repository is None else repository.rpartition("/")[2]


def language_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """Of a model with vision the config of its language model, of others the whole."""
    text = config.get("text_config")
    return cast("Mapping[str, object]", text) if isinstance(text, Mapping) else config


def quantization_section(config: Mapping[str, object]) -> object:
    """What config.json says of its quantisation, for a model with vision perhaps in the config of its language model.
    Old releases of compressed-tensors named it compression_config."""
    keys = "quantization_config", "compression_config"
    found = [part.get(key) for part in (config, language_config(config)) for key in keys]
    return next((section for section in found if section), None)


def quant_method(config: Mapping[str, object]) -> str | None:
    """What config.json says the weights are quantised with ("fp8", "gptq", ...), None if it says nothing."""
    section = quantization_section(config)
    if not section:
        return None
    method = cast("dict[str, object]", section).get("quant_method") if isinstance(section, dict) else None
    return method if isinstance(method, str) else "unknown"


def float8_block_size(directory: Path, config: Mapping[str, object]) -> tuple[int, int] | None:
    """Block size of an FP8 checkpoint by its config.json, None for an unquantised one. Raises `SourceError` for what
    is quantised in another way."""
    where = f"{directory / 'config.json'}: quantization_config"
    method = quant_method(config)
    if method is None:
        return None
    if method != "fp8":
        raise SourceError(
            f"{where} says {printable(repr(method))}{_NAMED.get(method, '')}: already quantised, in a way that is not "
            "decoded as a source.",
            hint=f"Start from the original, or from a checkpoint in BF16, FP8 blocks or {PACKED_METHOD}.",
        )
    section = cast("dict[str, object]", quantization_section(config))
    if section.get("fmt", "e4m3") != "e4m3":
        raise SourceError(f"{where}.fmt is {printable(repr(section['fmt']))}, 'e4m3' was needed.")
    return _two_positive(f"{where}.weight_block_size", section.get("weight_block_size", list(DEFAULT_BLOCK_SIZE)))


def _two_positive(where: str, value: object) -> tuple[int, int]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    match items:
        case [int(rows), int(columns)] if rows is not True and columns is not True and rows > 0 and columns > 0:
            return rows, columns
        case _:
            raise SourceError(
                f"{where} is {printable(repr(value))}, two positive integers were needed.",
                hint="FP8 with one scale per tensor or per row cannot be read.",
            )


def _check_agreement(raw: SafetensorsSource, says_float8: bool) -> None:
    """A config that contradicts the shards would make a runtime decode weights twice, or not at all."""
    first = next((name for name, info in raw.infos().items() if info.dtype.startswith("F8_E4M3")), None)
    where = raw.directory / "config.json"
    if says_float8 and first is None:
        raise SourceError(
            f"{where}: quantization_config says fp8, but no tensor is FP8: it is stale.",
            hint="Remove quantization_config from config.json if the weights were decoded.",
        )
    if not says_float8 and first is not None:
        raise SourceError(
            f"{raw.path_of(first)}: {printable(first)} is FP8, but {where} has no quantization_config.",
            hint='Add {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]} under that key.',
        )
