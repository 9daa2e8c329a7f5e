"""Readers of binary files, each with a sound file and what is done to it."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import gguf
import numpy as np
import torch

from quantkit.calibrate.documents import TextFile, read_documents
from quantkit.calibrate.hidden_states import MemoryRows, load
from quantkit.documents.evaluation import CheckpointFacts, EvaluationText, ScoringProtocol
from quantkit.documents.reference import ReferenceRecord
from quantkit.evaluate.reference_file import Positions, ReferenceStatistics, ReferenceWriter
from quantkit.formats.casting import bytes_of
from quantkit.formats.gguf.imatrix import Imatrix
from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.inspect.path import inspect_path
from quantkit.text.inspection import inspection_text
from tests.faults.fields import dat_fields, floats, gguf_fields, parquet_fields, safetensors_fields
from tests.faults.fuzzing import Reader, empty_folder
from tests.faults.mutations import mutated_bytes, mutated_fields, mutated_json_text
from tests.inspect.test_inspection_imatrix import COUNTS, ENTRIES
from tests.inspect.test_inspection_imatrix import write as write_imatrix

READ_BYTES = 1 << 16
"""Larger tensors are not read: a case has less data than that."""


def binary_readers(place: Path) -> list[Reader]:
    """One reader for each kind of file; files lie below folder ``place``."""
    makers = (safetensors, gguf_model, imatrix_gguf, imatrix_dat, parquet, reference, hidden_states)
    return [maker(empty_folder(place / maker.__name__)) for maker in makers]


def damaged_bytes(
    sound: bytes, fields: Sequence[bytes], header: int = 0, json_field: int | None = None
) -> Callable[[Random], bytes]:
    """Bytes anywhere or in the first ``header`` ones, whole fields, or the parts of field ``json_field``, whose length
    stands in the field before it."""

    def damaged(draw: Random) -> bytes:
        chance = draw.random()
        if json_field is not None and chance < 0.4:
            text = mutated_json_text(draw, json.loads(fields[json_field]))
            changed = list(fields)
            changed[json_field - 1 : json_field + 1] = struct.pack("<Q", len(text)), text
            return b"".join(changed)
        if chance < 0.7:
            return mutated_fields(draw, fields)
        return mutated_bytes(draw, sound, header if chance < 0.95 else 0)

    return damaged


def safetensors(folder: Path) -> Reader:
    """A shard alone in its folder."""
    infos = {"a": ("F32", [4, 4], 64), "b": ("BF16", [8], 16), "c": ("F8_E4M3", [2, 0], 0), "d": ("I64", [], 8)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, nbytes) in infos.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    sound = struct.pack("<Q", len(text)) + text + bytes(end)

    def read() -> None:
        with SafetensorsSource(folder) as source:
            for name, info in source.infos().items():
                if info.nbytes <= READ_BYTES:
                    source.read(name)
            source.fingerprint()

    damaged = damaged_bytes(sound, safetensors_fields(sound), 8 + len(text), json_field=1)
    return Reader("safetensors", folder / "model.safetensors", sound, damaged, read, binary=True)


def gguf_model(folder: Path) -> Reader:
    """A model of a layer, with the key-values that readers look at."""
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, "deepseek2")
    for key, value in {"block_count": 1, "expert_count": 2, "attention.head_count": 2, "vocab_size": 4}.items():
        writer.add_uint32(f"deepseek2.{key}", value)
    writer.add_string("general.name", "x")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é"])
    writer.add_array("tokenizer.ggml.scores", [1.0, 2.0])
    writer.add_bool("q", True)
    writer.add_float32("f", 1e-6)
    writer.add_uint64("u", 7)
    for name, shape in {"token_embd": (4, 32), "blk.0.ffn_gate_exps": (2, 4, 32), "output_norm": (32,)}.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read() -> None:
        with GgufReader(file) as found:
            for name, entry in found.tensors.items():
                if entry.nbytes <= READ_BYTES:
                    found.read_array(name)
        inspection_text(inspect_path(file))

    sound = file.read_bytes()
    fields = gguf_fields(sound)
    return Reader("GGUF", file, sound, damaged_bytes(sound, fields, len(sound) - len(fields[-1])), read, binary=True)


def imatrix_gguf(folder: Path) -> Reader:
    """As quantkit writes it."""
    sizes = {entry.name: (entry.n_matrices, entry.in_features) for entry in ENTRIES}
    file = write_imatrix(folder, COUNTS)
    sound = file.read_bytes()
    fields = gguf_fields(sound)
    damaged = damaged_bytes(sound, fields, len(sound) - len(fields[-1]))
    return Reader("imatrix .gguf", file, sound, damaged, lambda: _read_imatrix(file, sizes), binary=True)


def imatrix_dat(folder: Path) -> Reader:
    """As older versions of llama.cpp write it."""
    sizes = {"blk.0.attn_q_a.weight": (1, 8), "blk.0.ffn_down_exps.weight": (4, 4), "output.weight": (1, 4)}
    sound = struct.pack("<i", 3)
    for name, count in {name: math.prod(size) for name, size in sizes.items()}.items():
        sound += struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{count}f", 3, count, *[1.0] * count)
    sound += struct.pack("<ii", 7, 5) + b"a.txt"
    file = folder / "imatrix.dat"
    damaged = damaged_bytes(sound, dat_fields(sound))
    return Reader("imatrix .dat", file, sound, damaged, lambda: _read_imatrix(file, sizes), binary=True)


def _read_imatrix(file: Path, sizes: Mapping[str, tuple[int, int]]) -> None:
    """``sizes``: of the model's weights, matrices and columns."""
    inspection_text(inspect_path(file))
    with Imatrix.open(file) as found:
        for name in list(found.sizes)[:5]:
            found.of(name)
        found.check(sizes)


def parquet(folder: Path) -> Reader:
    """Texts and chats, compressed in each way."""
    import pyarrow as arrow
    import pyarrow.parquet

    file = folder / "text.parquet"
    tables = (
        {"text": ["hello", "wörld", "", "x" * 100] * 5},
        {"messages": [[{"role": "user", "content": "a"}]] * 5},
    )
    sound: list[bytes] = []
    for columns in tables:
        for compression in ("none", "snappy", "zstd", "gzip"):
            pyarrow.parquet.write_table(arrow.table(columns), file, compression=compression)
            sound.append(file.read_bytes())
    makers = [damaged_bytes(content, parquet_fields(content)) for content in sound]
    text = TextFile("text.parquet", file)

    def damaged(draw: Random) -> bytes:
        return draw.choice(makers)(draw)

    return Reader("parquet", file, sound[0], damaged, lambda: read_documents(text), binary=True)


def reference(folder: Path) -> Reader:
    """Statistics of a reference: two windows of 8 tokens, one layer with routed experts."""
    file = folder / "model.reference"
    draw = np.random.default_rng(0)
    tokens = torch.from_numpy(draw.integers(0, 32, (2, 8)))
    record = ReferenceRecord(
        versions={"quantkit": "0"},
        device="cpu",
        arithmetic="float32",
        reference=CheckpointFacts(name="m", path="m", format="BF16", fingerprint="aa", weights=10, nbytes=20),
        config={"vocab_size": 32},
        tokenizer_sha256=None,
        protocol=ScoringProtocol(name="windows", context=8, scored_per_window=7),
        text=(EvaluationText(file="a.txt", sha256="aa", tokens=16, windows=2),),
        window_domains=("a", "a"),
        tokens_sha256=hashlib.sha256(bytes_of(tokens.int())).hexdigest(),
        top=4,
        vocab_size=32,
    )
    n = 14
    singles = [torch.from_numpy(draw.random(n)) for _ in range(3)]
    top = torch.from_numpy(draw.integers(0, 32, (n, 4)))
    with ReferenceWriter(file, record, tokens, 1) as writer:
        writer.positions(0, Positions(top, torch.from_numpy(draw.random((n, 4))), *singles, top[:, 0]))
        writer.routings(0, [torch.from_numpy(draw.integers(0, 4, (16, 2)))])
        writer.finish(None)

    def read() -> None:
        with ReferenceStatistics(file) as found:
            found.positions(0, found.scored)
            found.mean_rest()
            found.routings(0, [4])

    sound = file.read_bytes()
    fields = safetensors_fields(sound)
    data, start = fields[2], fields[2].rindex(b'{"kind"')
    plain = damaged_bytes(sound, fields, 8 + len(fields[1].rstrip()), json_field=1)

    def damaged(draw: Random) -> bytes:
        if draw.random() < 0.5:
            return plain(draw)
        return b"".join(_with_record(fields, data[:start], mutated_json_text(draw, json.loads(data[start:]))))

    return Reader("reference statistics", file, sound, damaged, read, binary=True)


def _with_record(fields: Sequence[bytes], data: bytes, record: bytes) -> list[bytes]:
    """The file with another record behind the rest of its data, and a header that says so."""
    header = json.loads(fields[1])
    header["record"] = {"dtype": "U8", "shape": [len(record)], "data_offsets": [len(data), len(data) + len(record)]}
    text = json.dumps(header).encode()
    return [struct.pack("<Q", len(text)), text, data, record]


def hidden_states(folder: Path) -> Reader:
    """Saved streams: three rows of 4 tokens and 8 channels."""
    file = folder / "layer-0-stream-0.f32"
    store = MemoryRows(3, 4, 8)
    store.save(file)
    sound = file.read_bytes()
    damaged = damaged_bytes(sound, floats(sound))
    return Reader("hidden states", file, sound, damaged, lambda: load(file, MemoryRows(3, 4, 8)), binary=True)
