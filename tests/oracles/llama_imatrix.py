"""What llama-imatrix records, collected while llama.cpp runs its own graph: sums of squares of each matrix's input.

`collect(path, rows)` -> weight name to `Record`; `write(path, records, ...)` -> the file that llama-quantize reads.
The rules are those of tools/imatrix/imatrix.cpp: of plain products only those with a weight of a block and at least 16
tokens count, each slice of a 3-D weight for itself; of products by expert every one, each expert for itself.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from tests.oracles.llama_cpp import NODE_CALLBACK, LlamaModel, library

FEWEST_TOKENS = 16
F32 = 0


class Node(c.Structure):
    """struct ggml_tensor up to its name."""

    _fields_ = (
        ("type", c.c_int),
        ("buffer", c.c_void_p),
        ("ne", c.c_int64 * 4),
        ("nb", c.c_size_t * 4),
        ("op", c.c_int),
        ("op_params", c.c_int32 * 16),
        ("flags", c.c_int32),
        ("src", c.c_void_p * 10),
        ("view_src", c.c_void_p),
        ("view_offs", c.c_size_t),
        ("data", c.c_void_p),
        ("name", c.c_char * 64),
    )

    def array(self, dtype: type[np.generic]) -> np.ndarray:
        """A view of the data, dimensions in numpy's order (the contiguous one last)."""
        extent = sum((n - 1) * step for n, step in zip(self.ne, self.nb, strict=True)) + np.dtype(dtype).itemsize
        raw = np.ctypeslib.as_array(c.cast(self.data, c.POINTER(c.c_uint8)), (extent,))
        return np.ndarray(tuple(self.ne)[::-1], dtype, buffer=raw, strides=tuple(self.nb)[::-1])


@dataclass
class Record:
    """in_sum2 (slices, in_features) float64, counts (experts,) or (1,): tokens seen."""

    in_sum2: np.ndarray
    counts: np.ndarray


def collect(path: Path, rows: np.ndarray, threads: int = 1) -> dict[str, Record]:
    """Run rows (n, length) through the model, each in an empty float32 cache."""
    records: dict[str, Record] = {}
    op_name = library().call.ggml_op_name
    op_name.restype, op_name.argtypes = c.c_char_p, [c.c_int]

    def on_node(address: int, asks: bool, _user_data: object) -> bool:
        node = Node.from_address(address)
        operation = op_name(node.op)
        if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not asks
        weight, inputs = (Node.from_address(node.src[i]) for i in range(2))
        by_expert = operation == b"MUL_MAT_ID"
        if not by_expert and not is_recorded(weight, inputs):
            return not asks
        if not asks:
            ids = Node.from_address(node.src[2]).array(np.int32)[0, 0] if by_expert else None
            add(records, weight, inputs.array(np.float32), ids)
        return True

    callback = NODE_CALLBACK(on_node)
    with LlamaModel(path) as model, model.context(rows.shape[1], threads=threads, on_node=callback) as context:
        for row in rows:
            context.logits(row)
    return records


def is_recorded(weight: Node, inputs: Node) -> bool:
    return weight.name.startswith(b"blk.") and inputs.ne[1] >= FEWEST_TOKENS and inputs.type == F32


def add(records: dict[str, Record], weight: Node, inputs: np.ndarray, ids: np.ndarray | None) -> None:
    """inputs (1, heads, tokens, in) of a plain product, (1, tokens, 1 or top_k, in) with ids (tokens, top_k)."""
    slices = weight.ne[2]
    if ids is None:
        squares, counts = (inputs[0].astype(np.float64) ** 2).sum(axis=1), np.array([inputs.shape[2]])
        # A 2-D weight takes the slices of its input as so many more tokens.
        if slices == 1:
            squares, counts = squares.sum(axis=0, keepdims=True), counts * inputs.shape[1]
    else:
        tokens, top_k = ids.shape
        squared = np.broadcast_to(inputs[0].astype(np.float64) ** 2, (tokens, top_k, inputs.shape[3]))
        taken = ids.reshape(-1)[None] == np.arange(slices)[:, None]
        squares, counts = taken.astype(np.float64) @ squared.reshape(tokens * top_k, -1), taken.sum(axis=1)
    name = weight.name.decode()
    if name in records:
        records[name].in_sum2 += squares
        records[name].counts += counts
    else:
        records[name] = Record(squares, counts)


def write(path: Path, records: Mapping[str, Record], *, chunk_size: int, chunks: int, datasets: list[str]) -> None:
    """The imatrix.gguf of these records."""
    writer = gguf.GGUFWriter(path, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", datasets)
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, record in records.items():
        # As many rows as counts: the heads of a 3-D weight share one count, and so one row.
        writer.add_tensor(f"{name}.in_sum2", record.in_sum2.astype(np.float32).reshape(len(record.counts), -1))
        writer.add_tensor(f"{name}.counts", record.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_means(path: Path) -> dict[str, np.ndarray]:
    """Weight name -> mean squares (experts * in,) float32, as llama-quantize makes them: ones where nobody came."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    means: dict[str, np.ndarray] = {}
    for name in (name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")):
        counts = tensors[f"{name}.counts"].reshape(-1, 1)
        sums = tensors[f"{name}.in_sum2"].reshape(len(counts), -1)
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), 1)
        means[name] = np.ascontiguousarray(mean, dtype=np.float32).reshape(-1)
    return means
