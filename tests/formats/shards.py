"""Checkpoint folders for tests: sound ones through the reference writer, hostile ones byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantkit.errors import SourceError

FLOAT8_CONFIG = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}


def write_bytes(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header (an object to be dumped, or text as it stands) and data, whatever sense they make."""
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    """One tensor's header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_checkpoint(
    directory: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], config: Mapping[str, object] | None = None
) -> Path:
    """Shards through the reference writer, an index over all of them, and config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(dict(tensors), directory / file)
    write_index(directory, {name: file for file, tensors in shards.items() for name in tensors})
    (directory / "config.json").write_text(json.dumps(config or {}))
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    """The index file with this weight map."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_one_line(error: SourceError, *words: str) -> None:
    """The message is one short printable line which holds all the words."""
    message = str(error)
    assert message.isprintable(), ascii(message)
    assert len(message) < 1200
    for word in words:
        assert word in message, message


def random_float8(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite e4m3 code somewhere, subnormals and both zeros included, and scales of very different size."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.int16).to(torch.uint8)
    bits[(bits & 0x7F) == 0x7F] = 0x80
    exponents = torch.randint(-20, 4, (-(-rows // 128), -(-columns // 128)), generator=generator)
    return bits.view(torch.float8_e4m3fn), torch.rand(exponents.shape, generator=generator).add_(0.1) * 2.0**exponents
