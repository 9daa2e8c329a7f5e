"""Statistics of a reference on disk: what it takes to score candidates without its weights.

One safetensors file. W windows of L tokens, S scored positions each, the T most likely tokens of every position:

    tokens        int32 (W, L)      the text, cut
    top_tokens    int32 (W, S, T)   the reference's most likely tokens, best first
    top_logits    float32 (W, S, T) their logits
    log_sum       float64 (W, S)    log of the sum of exp(logit) over the vocabulary
    rest          float64 (W, S)    probability of all other tokens together
    target_nll    float64 (W, S)    loss of the token that follows
    first_token   int32 (W, S)      the most likely token, of equal ones the lowest
    routing.N.B   uint8 or int16 (W * L, K)   experts chosen by block B of decoder layer N
    record        uint8             JSON of `ReferenceRecord`: model, text, protocol, noise floor

It is written through a ``.new`` beside it, a few windows at a time, and read the same way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from quantkit.documents.evaluation import NoiseFloor
from quantkit.documents.read import first_problem
from quantkit.documents.reference import REFERENCE_KIND, ReferenceRecord
from quantkit.errors import SourceError
from quantkit.formats.casting import bytes_of
from quantkit.formats.preallocated import disk_errors, sync_directory
from quantkit.formats.safetensors.header import StoredTensor, check_json_size, printable, read_header
from quantkit.formats.shard_files import ShardFiles, read_into
from quantkit.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

TOP = 512
"""Tokens of each position that are kept one by one."""
_MAX_RECORD_BYTES = 200_000_000
_HEADER_BYTES = 4096
_ENTRY_BYTES = 160
"""Room in the header for one tensor."""
_ROUTING_BYTES = 16
"""Reserved for the choice of a token in a layer."""
_ROUTING_DTYPES = ("U8", "I16")
_REST_AT_ONCE = 2**20
_ANEW = "Make it anew: quantkit evaluate REFERENCE --save-reference FILE."


@dataclass(frozen=True, slots=True)
class Positions:
    """Some scored positions of the reference, flat: top_tokens (n, T) int64, top_logits (n, T) float32; log_sum, rest
    and target_nll (n,) float64, first_token (n,) int64."""

    top_tokens: Tensor
    top_logits: Tensor
    log_sum: Tensor
    rest: Tensor
    target_nll: Tensor
    first_token: Tensor


def _shapes(record: ReferenceRecord) -> dict[str, TensorInfo]:
    """The tensors whose shapes follow from the record, in the order of the file."""
    n_windows = sum(text.windows for text in record.text)
    each = (n_windows, record.protocol.scored_per_window)
    listed = (
        TensorInfo("log_sum", each, "F64"),
        TensorInfo("rest", each, "F64"),
        TensorInfo("target_nll", each, "F64"),
        TensorInfo("top_logits", (*each, record.top), "F32"),
        TensorInfo("top_tokens", (*each, record.top), "I32"),
        TensorInfo("first_token", each, "I32"),
        TensorInfo("tokens", (n_windows, record.protocol.context), "I32"),
    )
    return {info.name: info for info in listed}


# ------------------------------------------------------------------------------------------------------------- writing


class ReferenceWriter:
    """The file as it grows. Use it in ``with``: without `finish` nothing is left behind."""

    def __init__(self, path: Path, record: ReferenceRecord, tokens: Tensor, n_layers: int) -> None:
        """Reserve the space. tokens (W, L). Raises `OutputError` if the disk has no room."""
        self.path = path
        self.record = record
        self.scored = record.protocol.scored_per_window
        self._new = path.with_name(path.name + ".new")
        self._infos = _shapes(record)
        self._start = _HEADER_BYTES + _ENTRY_BYTES * (len(self._infos) + 2 * n_layers)
        self._places: dict[str, int] = {}
        self._end = self._start
        for info in self._infos.values():
            self._place(info)
        with disk_errors(path):
            self._fd = os.open(self._new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _reserve(self._fd, self._end + n_layers * tokens.numel() * _ROUTING_BYTES)
            except OSError:
                self.close()
                raise
        self._write("tokens", 0, tokens.int())

    @property
    def top(self) -> int:
        """Tokens kept of each position."""
        return self.record.top

    def routings(self, layer: int, routings: Sequence[Tensor]) -> None:
        """Experts chosen in a layer: (tokens, top_k) indices of each of its blocks."""
        import torch

        for block, indices in enumerate(routings):
            largest = int(indices.max()) if indices.numel() else 0
            dtype = "U8" if largest < 2**8 else "I16"
            info = TensorInfo(f"routing.{layer}.{block}", tuple(indices.shape), dtype)
            self._infos[info.name] = info
            self._place(info)
            self._write(info.name, 0, indices.cpu().to(getattr(torch, DTYPES[dtype][1])))

    def positions(self, first: int, found: Positions) -> None:
        """Scored positions from the ``first`` on, counted over all windows."""
        for name in ("log_sum", "rest", "target_nll"):
            self._write(name, first, getattr(found, name).double())
        for name in ("top_tokens", "first_token"):
            self._write(name, first, getattr(found, name).int(), self.top if name == "top_tokens" else 1)
        self._write("top_logits", first, found.top_logits.float(), self.top)

    def finish(self, noise_floor: NoiseFloor | None) -> None:
        """Write record and header, and give the file its name."""
        text = self.record.model_copy(update={"noise_floor": noise_floor}).model_dump_json().encode()
        self._infos["record"] = TensorInfo("record", (len(text),), "U8")
        self._place(self._infos["record"])
        with disk_errors(self.path):
            self._pwrite(memoryview(text), self._places["record"])
            self._pwrite(memoryview(self._header()), 0)
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
            self._new.replace(self.path)
            sync_directory(self.path.parent)

    def close(self) -> None:
        """Give the descriptor back; remove what is not finished."""
        os.close(self._fd)
        with suppress(FileNotFoundError):
            self._new.unlink()

    def __enter__(self) -> ReferenceWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _header(self) -> bytes:
        """Length, JSON, and spaces up to the data."""
        facts = self.record
        entries: dict[str, object] = {
            "__metadata__": {
                "kind": REFERENCE_KIND,
                "reference": facts.reference.fingerprint,
                "tokens_sha256": facts.tokens_sha256,
                "protocol": facts.protocol.name,
                "context": str(facts.protocol.context),
            }
        }
        for name, info in self._infos.items():
            begin = self._places[name] - self._start
            entries[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [begin, begin + info.nbytes],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        assert len(text) + 8 <= self._start, f"{len(text)} bytes of header, {self._start} are reserved"
        return (self._start - 8).to_bytes(8, "little") + text.ljust(self._start - 8)

    def _place(self, info: TensorInfo) -> None:
        self._places[info.name] = self._end
        self._end += info.nbytes

    def _write(self, name: str, first: int, tensor: Tensor, width: int = 1) -> None:
        offset = self._places[name] + first * width * DTYPES[self._infos[name].dtype][0]
        with disk_errors(self.path):
            self._pwrite(bytes_of(tensor), offset)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done : done + 2**30], offset + done)


def _reserve(fd: int, nbytes: int) -> None:
    """Before hours of work: raise `OSError` if the disk has no room. A file system that cannot reserve is let go."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise


# ------------------------------------------------------------------------------------------------------------- reading


def is_reference_file(path: Path) -> bool:
    """Whether a file holds the statistics of a reference, by the metadata at its start."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return REFERENCE_KIND.encode() in file.read(256)


class ReferenceStatistics:
    """A finished file. Use it in ``with``. ``tokens`` (W, L) int64."""

    def __init__(self, path: Path) -> None:
        """Read header, record and tokens. Raises `SourceError` in one line for any other file, and a damaged one."""
        self.path = path
        self._stored = read_header(path)
        self._files = ShardFiles(path.parent, {path.name: path.stat().st_size})
        try:
            self.record = self._record()
            self._check()
            self.tokens = self._read("tokens", 0, None).long()
            found = hashlib.sha256(bytes_of(self.tokens.int())).hexdigest()
            if found != self.record.tokens_sha256:
                raise self._refusal("its tokens are not those it was made of")
            self._check_tokens(self.tokens)
        except SourceError:
            self.close()
            raise

    @property
    def scored(self) -> int:
        """Positions of a window that are scored."""
        return self.record.protocol.scored_per_window

    def positions(self, first: int, last: int) -> Positions:
        """Scored positions [first, last), counted over all windows. Raises `SourceError` for values that cannot be."""
        import torch

        top_tokens, top_logits = self._read("top_tokens", first, last), self._read("top_logits", first, last)
        singles = [self._read(name, first, last) for name in ("log_sum", "rest", "target_nll", "first_token")]
        self._check_tokens(top_tokens)
        self._check_tokens(singles[3])
        if not all(bool(torch.isfinite(values).all()) for values in (top_logits, *singles[:3])):
            raise self._refusal("a logit or a loss is not finite")
        log_sum, rest, nll, first_token = singles
        return Positions(top_tokens.long(), top_logits, log_sum, rest, nll, first_token.long())

    def mean_rest(self) -> float:
        """Mean over positions of the probability of all tokens but the top ones."""
        n = math.prod(self._stored["rest"].info.shape)
        parts = (self._read("rest", at, min(at + _REST_AT_ONCE, n)).sum() for at in range(0, n, _REST_AT_ONCE))
        return float(sum(parts)) / n if n else math.nan

    def routings(self, layer: int, n_experts: Sequence[int]) -> list[Tensor]:
        """Experts that the reference chose in a layer: (tokens, top_k) int64 of each block, which has ``n_experts``."""
        return [self._routing(f"routing.{layer}.{block}", n) for block, n in enumerate(n_experts)]

    def _routing(self, name: str, n_experts: int) -> Tensor:
        stored = self._stored.get(name)
        shape = () if stored is None else stored.info.shape
        fits = len(shape) == 2 and shape[0] == self.tokens.numel() and 0 < shape[1] <= n_experts
        if stored is not None and stored.info.dtype in _ROUTING_DTYPES and fits:
            indices = self._read(name, 0, None).long()
            if 0 <= int(indices.min()) <= int(indices.max()) < n_experts:
                return indices
        raise self._refusal(f"{name} is not a choice of {n_experts:,} experts for {self.tokens.numel():,} tokens")

    def close(self) -> None:
        """Give the descriptor back."""
        self._files.close()

    def __enter__(self) -> ReferenceStatistics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.record.vocab_size:
            raise self._refusal(f"a token is outside of the vocabulary of {self.record.vocab_size:,}")

    def _record(self) -> ReferenceRecord:
        stored = self._stored.get("record")
        if stored is None or stored.info.dtype != "U8" or len(stored.info.shape) != 1:
            raise self._refusal(
                f"is no file of {REFERENCE_KIND}", "Give the original's folder, or what --save-reference wrote."
            )
        if stored.info.nbytes > _MAX_RECORD_BYTES:
            raise self._refusal(f"its record has {stored.info.nbytes:,} bytes")
        text = bytes_of(self._read("record", 0, None)).tobytes()
        check_json_size(text, f"{printable(str(self.path))}: record")
        try:
            return ReferenceRecord.model_validate_json(text)
        except ValidationError as error:
            raise self._refusal(f"its record is not readable ({printable(first_problem(error))})") from None

    def _check(self) -> None:
        protocol = self.record.protocol
        if not 0 < protocol.scored_per_window < protocol.context or not 0 < self.record.top <= self.record.vocab_size:
            raise self._refusal("its record contradicts itself")
        for name, needed in _shapes(self.record).items():
            stored = self._stored.get(name)
            if stored is None or stored.info != needed:
                found = "missing" if stored is None else f"{stored.info.dtype} {list(stored.info.shape)}"
                raise self._refusal(f"{name} is {found}, {needed.dtype} {list(needed.shape)} was needed")
        if len(self.record.window_domains) != _shapes(self.record)["tokens"].shape[0]:
            raise self._refusal("its record names other windows than it holds")

    def _read(self, name: str, first: int, last: int | None) -> Tensor:
        """The whole of a tensor (last None), or scored positions [first, last) of it, flat over the windows."""
        import torch

        stored: StoredTensor = self._stored[name]
        shape = stored.info.shape
        if last is not None:
            shape = (last - first, *shape[2:])
        tensor = torch.empty(shape, dtype=getattr(torch, DTYPES[stored.info.dtype][1]))
        offset = first * math.prod(shape[1:]) * DTYPES[stored.info.dtype][0]
        with self._files.borrow(self.path.name) as file:
            read_into(file, tensor, stored.start + offset, str(self.path))
        return tensor

    def _refusal(self, problem: str, hint: str = _ANEW) -> SourceError:
        return SourceError(f"{printable(str(self.path))}: {problem}.", hint=hint)
