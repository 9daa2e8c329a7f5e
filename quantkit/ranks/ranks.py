"""What ranks tell each other. All of them call the same functions in the same order.

Values and tensors of the processor go by gloo, tensors of a GPU by NCCL. Every exchange moves bytes and computes
nothing, so it changes no bit. With one rank nothing is exchanged: `ALONE`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from quantkit.errors import QuantkitError, RankLostError

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank ``number`` of ``count``, ``on_host`` of them on this host. ``device``: where it computes. ``control``: the
    group of gloo, ``data``: that of NCCL or the same; None of both for a rank alone."""

    number: int = 0
    count: int = 1
    device: torch.device = CPU
    control: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    on_host: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank keeps the journal and finishes the result."""
        return self.number == 0

    def gathered(self, value: T) -> list[T]:
        """The value of every rank, by rank, everywhere."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _lost():
            dist.all_gather_object(found, value, group=self.control)
        return cast("list[T]", found)

    def agreed(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on this rank. If it is refused on some rank, it is on all: rank 0 raises that error,
        the others `RankLostError`."""
        if self.count == 1:
            return make()
        made, error = None, None
        try:
            made = make()
        except QuantkitError as refused:
            error = refused
        self._refuse_together(error)
        return cast("T", made)

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, everywhere. Raises as `agreed` does."""
        made = self.agreed(lambda: make() if self.first else None)
        return cast("T", made if self.count == 1 else self.shared(made, 0))

    def _refuse_together(self, error: QuantkitError | None) -> None:
        told = None if error is None else (type(error), error.message, error.hint)
        refused = [(rank, one) for rank, one in enumerate(self.gathered(told)) if one is not None]
        if not refused:
            return
        if not self.first:
            raise RankLostError("refused on this or another rank: rank 0 says why.")
        rank, (kind, message, hint) = refused[0]
        raise kind(message if rank == 0 else f"rank {rank}: {message}", hint=hint) from error

    def shared(self, value: T, owner: int) -> T:
        """The value of rank ``owner``, everywhere; tensors in it arrive where this rank computes, or on the processor
        if they were there."""
        if self.count == 1:
            return value
        packed = _packed(value) if owner == self.number else (b"", [])
        head: list[Any] = [packed[0], [_shape_of(tensor) for tensor in packed[1]]]
        with _lost():
            dist.broadcast_object_list(head, src=owner, group=self.control)
        tensors = packed[1] if owner == self.number else [self._empty(*shape) for shape in head[1]]
        for tensor in tensors:
            self.broadcast(tensor, owner)
        return value if owner == self.number else cast("T", _unpacked(head[0], tensors))

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a contiguous tensor with that of rank ``owner``."""
        if self.count > 1 and tensor.numel():
            with _lost():
                dist.broadcast(_bytes(tensor), src=owner, group=self._group(tensor))

    def send(self, tensor: Tensor, to: int) -> None:
        """Give a contiguous tensor to one rank, which calls `receive`."""
        with _lost():
            dist.send(_bytes(tensor), dst=to, group=self._group(tensor))

    def receive(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with what one rank sends."""
        with _lost():
            dist.recv(_bytes(tensor), src=source, group=self._group(tensor))

    def exchange(self, rows: Tensor, to_each: Sequence[int], from_each: Sequence[int]) -> Tensor:
        """All-to-all: rows (n, width), the first ``to_each[0]`` for rank 0 and so on -> rows of rank 0, of rank 1...,
        ``from_each`` many of them, on the same device."""
        found = rows.new_empty(sum(from_each), rows.shape[1])
        with _lost():
            dist.all_to_all_single(
                _bytes(found), _bytes(rows.contiguous()), list(from_each), list(to_each), group=self._group(rows)
            )
        return found

    def barrier(self) -> None:
        """Wait for all."""
        self.gathered(None)

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self.data if tensor.is_cuda else self.control

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, on_gpu: bool) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device if on_gpu else CPU)


ALONE = Ranks()
"""One process, as ever."""


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, rows as rows: gloo does not know every dtype."""
    assert tensor.is_contiguous(), "what is exchanged lies in one piece"
    return tensor.view(torch.uint8) if tensor.ndim == 2 else tensor.view(-1).view(torch.uint8)


def _shape_of(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, bool]:
    return tuple(tensor.shape), tensor.dtype, tensor.is_cuda


class _Pickler(pickle.Pickler):
    """Leaves the tensors out, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: object) -> int | None:
        """See `pickle.Pickler.persistent_id`."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.contiguous())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        """See `pickle.Unpickler.persistent_load`."""
        return self._tensors[pid]


def _packed(value: object) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def _unpacked(content: bytes, tensors: Sequence[Tensor]) -> object:
    return _Unpickler(io.BytesIO(content), tensors).load()


@contextmanager
def _lost() -> Generator[None]:
    """What torch says when a rank is gone or silent, in one line."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0].rpartition("] ")[2][:120]
        raise RankLostError(
            f"another rank is gone or did not answer ({said}).",
            hint="Give the same command again, with as many ranks or others: it goes on where it stopped.",
        ) from error
