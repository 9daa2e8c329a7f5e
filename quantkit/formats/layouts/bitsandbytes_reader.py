"""Reads bitsandbytes checkpoints of 4 bits (NF4, FP4).

Of a linear with weight (N, K) a file holds, n = N * K and b blocks of ``blocksize`` consecutive weights (row by row),

    weight                                  uint8 (n / 2, 1)   two codes to a byte, the earlier one in the high nibble
    weight.quant_map                        float32 (16,)      what each code stands for
    weight.absmax                           float32 (b,)       of each block; or, doubly quantised, uint8 codes with
    weight.nested_quant_map, .nested_absmax float32 (256,), (b / nested_blocksize,)
    weight.quant_state.bitsandbytes__nf4    uint8              JSON: quant_type, shape, blocksize, dtype, nested_*

and weight = quant_map[code] * absmax, where doubly quantised absmax = nested_quant_map[code] * nested_absmax +
nested_offset. Products and sums are rounded to float32, as bitsandbytes does; runtimes round the weight to "dtype".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderReader, PackedLinear, Rows, by_runs, part, row_parts
from quantkit.formats.safetensors.header import parse_json_object, printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("nf4", "fp4")
_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 4096
_MAX_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class _Nested:
    block: int
    offset: float


@dataclass(frozen=True, slots=True)
class _FourBit:
    info: TensorInfo
    state: str
    block: int
    nested: _Nested | None
    scheme: None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """See `PackedLinear`."""
        names = (".absmax", ".quant_map", *((".nested_absmax", ".nested_quant_map") if self.nested else ()))
        return (self.info.name, *(self.info.name + name for name in names), self.state)

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`. Only these rows are read."""
        return by_runs(rows, self.info.shape[1], partial(self._rows, raw))

    def _rows(self, raw: SafetensorsSource, start: int, stop: int) -> Tensor:
        import torch

        weight = torch.empty(stop - start, self.info.shape[1])
        for span in row_parts(slice(start, stop)):
            weight[span] = self._run(raw, start + span.start, start + span.stop)
        return weight

    def _run(self, raw: SafetensorsSource, start: int, stop: int) -> Tensor:
        import torch

        n_in = self.info.shape[1]
        first, last = start * n_in, stop * n_in
        packed = raw.read(self.info.name, (first // 2, last // 2)).flatten()
        values = raw.read(f"{self.info.name}.quant_map")
        # What each of 256 bytes stands for: its high nibble's value, then its low nibble's.
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), 1)
        weight = torch.index_select(pairs, 0, packed.int()).flatten()
        blocks = (first // self.block, -(-last // self.block))
        largest = self._absmax(raw, *blocks)
        if first % self.block == last % self.block == 0:
            return weight.view(-1, self.block).mul_(largest.unsqueeze(-1)).view(stop - start, n_in)
        skipped = first - blocks[0] * self.block
        each = largest.repeat_interleave(self.block)[skipped : skipped + len(weight)]
        return weight.mul_(each).view(stop - start, n_in)

    def _absmax(self, raw: SafetensorsSource, first: int, last: int) -> Tensor:
        import torch

        absmax = raw.read(f"{self.info.name}.absmax", (first, last))
        if self.nested is None:
            return absmax
        scales = raw.read(f"{self.info.name}.nested_absmax")[torch.arange(first, last) // self.nested.block]
        return raw.read(f"{self.info.name}.nested_quant_map")[absmax.int()] * scales + self.nested.offset


def _find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    where = f"{raw.directory / 'config.json'}: quantization_config"
    if section.get("load_in_8bit") or not section.get("load_in_4bit", True):
        raise SourceError(f"{where} does not say load_in_4bit: only 4-bit bitsandbytes weights can be read.")
    storage = section.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise SourceError(f"{where}.bnb_4bit_quant_storage is {printable(repr(storage))}, 'uint8' was needed.")
    states = {name.partition(_STATE)[0]: name for name in raw.infos() if _STATE in name}
    if not states:
        raise SourceError(f"{where} says 'bitsandbytes', but no tensor is named *{_STATE}nf4.")
    return {name: _linear(raw, name, state) for name, state in states.items()}


def _linear(raw: SafetensorsSource, name: str, state_name: str) -> _FourBit:
    where = f"{raw.path_of(state_name)}: {printable(state_name)}"
    state_info = part(raw, state_name, ("U8",), (None,))
    if state_info.numel > _MAX_STATE_BYTES:
        raise SourceError(f"{where}: has {state_info.numel:,} bytes, at most {_MAX_STATE_BYTES:,} are allowed.")
    state = parse_json_object(bytes(raw.read(state_name).tolist()), where)
    kind = state.get("quant_type")
    if kind not in KINDS or not state_name.endswith(f"__{kind}"):
        raise SourceError(f"{where}: quant_type is {printable(repr(kind))}, {' or '.join(KINDS)} was needed.")
    n_out, n_in = _matrix(where, state.get("shape"))
    block = _block(where, "blocksize", state.get("blocksize"))
    n_blocks = math.ceil(n_out * n_in / block)
    part(raw, name, ("U8",), (n_out * n_in // 2, 1))
    part(raw, f"{name}.quant_map", ("F32",), (16,))
    nested = _nested(where, state) if f"{name}.nested_absmax" in raw.infos() else None
    part(raw, f"{name}.absmax", ("F32",) if nested is None else ("U8",), (n_blocks,))
    if nested is not None:
        part(raw, f"{name}.nested_quant_map", ("F32",), (256,))
        part(raw, f"{name}.nested_absmax", ("F32",), (math.ceil(n_blocks / nested.block),))
    return _FourBit(TensorInfo(name, (n_out, n_in), "F32"), state_name, block, nested)


def _nested(where: str, state: Mapping[str, object]) -> _Nested:
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise SourceError(f"{where}: nested_offset is {printable(repr(offset))}, a number was needed.")
    return _Nested(_block(where, "nested_blocksize", state.get("nested_blocksize")), float(offset))


def _matrix(where: str, value: object) -> tuple[int, int]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    match items:
        case [int(n_out), int(n_in)] if n_out > 0 and n_in > 0 and n_in % 2 == 0:
            return n_out, n_in
        case _:
            raise SourceError(
                f"{where}: shape is {printable(repr(value))}, (outputs, inputs) with an even number of inputs was "
                "needed."
            )


def _block(where: str, key: str, value: object) -> int:
    if not isinstance(value, int) or value is True or not 2 <= value <= _MAX_BLOCK:
        raise SourceError(f"{where}: {key} is {printable(repr(value))}, 2 to {_MAX_BLOCK:,} was needed.")
    return value


BITSANDBYTES_READER = FolderReader("bitsandbytes", _find)
