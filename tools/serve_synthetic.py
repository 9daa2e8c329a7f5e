"""Serves a checkpoint of DeepSeek V3's architecture by HTTP ranges, 688 GB by default, of which no byte is stored.

    PYTHONPATH=. python tools/serve_synthetic.py [--port N] [--processes N] [--layers N] [--experts N] [--hidden N]
        [--vocab N]
    quantkit plan http://127.0.0.1:8688/deepseek-v3/ -r deepseek-v3-w4a16-rtn

Config, index and headers are exact, those of the release but for the cuts between shards. A byte of a tensor depends on
the tensor's name and its place alone: each tensor is a window into a table of random numbers, at an offset that its
name says. FP8 codes are normal and no NaN; scales make a linear's outputs as large as its inputs; norms are near one.
So a layer computes with finite numbers, of no sense. The tokenizer is that of examples/nano-deepseek-v3.

Reduced: --layers 3 --experts 8 --hidden 1024 --vocab 4096 divides widths as hidden does, for tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from quantkit.arch import arch_of
from quantkit.formats.safetensors.header import INDEX_NAME
from quantkit.formats.safetensors.writer import Shard, ShardLayout, layout_shards
from quantkit.tensors import DTYPES, TensorInfo

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAME = "deepseek-v3"
SHARD_BYTES = 4_300_000_000
"""About those of the release, which has 163 shards."""
BLOCK = 128
CODE_SPREAD = 100.0
"""Standard deviation of FP8 codes, of which the largest is 448."""
TABLE = 1 << 24
"""Numbers in a table: the period after which a tensor repeats itself."""


def config_of(layers: int = 61, experts: int = 256, hidden: int = 7168, vocab: int = 129_280) -> dict[str, Any]:
    """config.json of the 671 B release, or of one with fewer layers, experts and tokens, and narrower."""
    config = json.loads((EXAMPLES / "deepseek-v3-671b" / "config.json").read_text())
    scale = config["hidden_size"] // hidden
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        config[name] = max(BLOCK, config[name] // scale // BLOCK * BLOCK)
    for name in ("q_lora_rank", "kv_lora_rank"):
        config[name] = max(BLOCK, config[name] // scale // BLOCK * BLOCK)
    for name in ("num_attention_heads", "num_key_value_heads"):
        config[name] = max(2, config[name] // scale)
    groups = min(config["n_group"], max(1, experts // 4))
    reduced = {"n_group": groups, "topk_group": min(config["topk_group"], groups)}
    reduced["num_experts_per_tok"] = min(config["num_experts_per_tok"], experts // groups * reduced["topk_group"])
    config.update(num_hidden_layers=layers, n_routed_experts=experts, vocab_size=vocab, **reduced)
    config.update(bos_token_id=0, eos_token_id=1)
    config["first_k_dense_replace"] = min(config["first_k_dense_replace"], max(1, layers - 1))
    return {key: value for key, value in config.items() if key != "auto_map"}


@dataclass(frozen=True)
class Checkpoint:
    """All that is served. ``gains``: by the name of a tensor how large its numbers are."""

    config: dict[str, Any]
    layout: ShardLayout
    gains: dict[str, float]

    @classmethod
    def of(cls, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> Checkpoint:
        """By its config.json."""
        groups: list[tuple[TensorInfo, ...]] = []
        gains: dict[str, float] = {}
        for spec in arch_of(config).tensors():
            gain = 1.0 if spec.name.endswith("embed_tokens.weight") else spec.shape[-1] ** -0.5
            if spec.linear:
                blocks = tuple(-(-size // BLOCK) for size in spec.shape)
                scale = TensorInfo(f"{spec.name}_scale_inv", blocks, "F32")
                groups.append((TensorInfo(spec.name, spec.shape, "F8_E4M3"), scale))
                gains[scale.name] = gain / CODE_SPREAD
            else:
                groups.append((TensorInfo(spec.name, spec.shape, "F32" if spec.float32 else "BF16"),))
                gains[spec.name] = gain
        return cls(config, layout_shards(groups, shard_bytes), gains)

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """By the name of the file."""
        return {shard.file: shard for shard in self.layout.shards}

    @cached_property
    def small(self) -> dict[str, bytes]:
        """Files that are held whole."""
        nano = EXAMPLES / "nano-deepseek-v3"
        tokenizer = {name: (nano / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
        config = (json.dumps(self.config, indent=2) + "\n").encode()
        return {"config.json": config, INDEX_NAME: self.layout.index(), **tokenizer}

    def size(self, file: str) -> int | None:
        """Bytes of a file, None if there is none."""
        if file in self.small:
            return len(self.small[file])
        return self.shards[file].nbytes if file in self.shards else None

    def pieces(self, file: str, start: int, stop: int, tables: Tables) -> Iterator[memoryview]:
        """Bytes ``[start, stop)`` of a file."""
        if file in self.small:
            yield memoryview(self.small[file])[start:stop]
            return
        shard = self.shards[file]
        if start < len(shard.header):
            yield memoryview(shard.header)[start:stop]
        for info, offset in zip(shard.tensors, shard.offsets, strict=True):
            first, last = max(start, offset), min(stop, offset + info.nbytes)
            if first < last:
                yield from tables.window(info, self.gains.get(info.name, 1.0), first - offset, last - offset)


class Tables:
    """Random numbers, the same in every process and on every machine."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(TABLE, generator=generator)
        codes = (normal * CODE_SPREAD).clamp(-448, 448).to(torch.float8_e4m3fn)
        self._codes = memoryview(codes.view(torch.uint8).numpy())
        self._normal = normal
        self._made: dict[tuple[str, float], memoryview] = {("F8_E4M3", 1.0): self._codes}

    def window(self, info: TensorInfo, gain: float, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes ``[start, stop)`` of a tensor's data."""
        width = DTYPES[info.dtype][0]
        table = self._table(info, gain)
        begin = int.from_bytes(hashlib.sha256(info.name.encode()).digest()[:8], "little") % TABLE * width
        while start < stop:
            at = (begin + start) % len(table)
            part = table[at : at + stop - start]
            yield part
            start += len(part)

    def _table(self, info: TensorInfo, gain: float) -> memoryview:
        kind = info.dtype if len(info.shape) > 1 else f"{info.dtype} vector"
        if (kind, gain) not in self._made:
            self._made[kind, gain] = self._numbers(kind, gain)
        return self._made[kind, gain]

    def _numbers(self, kind: str, gain: float) -> memoryview:
        noise = self._normal
        if kind == "F32 vector":  # what is added to the router's scores
            made = 0.01 * noise
        elif kind == "BF16 vector":  # norms
            made = (1 + 0.1 * noise).bfloat16()
        elif kind == "F32":  # scales
            made = gain * torch.exp(0.2 * noise)
        else:
            made = (gain * noise).bfloat16()
        return memoryview(made.view(torch.uint8).numpy() if made.ndim else np.empty(0, np.uint8))


class Server(ThreadingHTTPServer):
    """One of several processes that share a port."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, checkpoint: Checkpoint, tables: Tables) -> None:
        self.checkpoint = checkpoint
        self.tables = tables
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        """The kernel shares connections out among the processes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


class Handler(BaseHTTPRequestHandler):
    """Answers GET with or without a range."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """A range of a file, or the whole."""
        checkpoint, file = self.server.checkpoint, urlsplit(self.path).path.removeprefix(f"/{NAME}/")
        size = checkpoint.size(file)
        if size is None:
            self._head(404, 0, {})
            return
        start, stop, status, headers = 0, size, 200, {"ETag": f'"{file}-{size}"'}
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last or size) + 1, size), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._head(status, stop - start, headers)
        for piece in checkpoint.pieces(file, start, stop, self.server.tables):
            self.connection.sendall(piece)

    def _head(self, status: int, nbytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(nbytes)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8688)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--vocab", type=int, default=129_280)
    options = parser.parse_args()
    checkpoint = Checkpoint.of(config_of(options.layers, options.experts, options.hidden, options.vocab))
    tables = Tables()
    first = Server(options.port, checkpoint, tables)
    children = [pid for _ in range(options.processes - 1) if (pid := _serve_in_child(options.port, checkpoint, tables))]
    print(f"{checkpoint.layout.nbytes:,} bytes at http://127.0.0.1:{options.port}/{NAME}/", flush=True)
    try:
        first.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
    finally:
        for child in children:
            os.kill(child, signal.SIGTERM)


def _serve_in_child(port: int, checkpoint: Checkpoint, tables: Tables) -> int:
    """Process id of another server on the same port; the tables are shared until they are written to: never."""
    child = os.fork()
    if not child:
        try:
            Server(port, checkpoint, tables).serve_forever()
        finally:
            os._exit(0)
    return child


if __name__ == "__main__":
    main()
